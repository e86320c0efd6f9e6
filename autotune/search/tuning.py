"""A tuning run: a race per item, then the models end to end with the winners, written to the file if faster."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from autotune.items.candidates import candidates
from autotune.items.device import Device, Entries
from autotune.items.log import Log
from autotune.items.results import Failure
from autotune.items.work import Item, Target
from autotune.search.search import Race, compare_in_pairs, new_race, search
from autotune.search.session import CandidateFailed, Session
from autotune.search.store import NewEntry, merge, seal_of
from tinysr_kernels.launch import configs

SEARCH_FRACTION = 0.9
"""Fraction of the budget for the races; timing the models end to end takes the rest."""


@dataclass(frozen=True)
class ModelTiming:
    """A model timed end to end, median microseconds before and after.

    outcome: 1 faster, -1 slower, 0 no significant difference. failure: why it could not be timed.
    """

    target: Target
    before_us: float
    after_us: float
    outcome: int
    failure: Failure | None = None


@dataclass
class Outcome:
    """The result of a run.

    models: end to end, before and after. accepted: whether the new configurations are accepted; why: the reason. pdl:
    whether programmatic dependent launch is enabled; pdl_models: the models with the old and the opposite setting,
    where that was measured. written: whether the file changed. spent: seconds. counts: of measurements, by kind.
    """

    races: list[Race]
    models: list[ModelTiming] = field(default_factory=list)
    accepted: bool = False
    why: str = ""
    written: bool = False
    pdl: bool = False
    pdl_models: list[ModelTiming] = field(default_factory=list)
    spent: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


def tune(
    targets: Sequence[Target],
    items: Sequence[Item],
    device: Device,
    file: Path,
    *,
    budget: float,
    samples: Path | None = None,
    progress: Callable[[float], None] = lambda spent: None,
    on_batch: Callable[[Race], None] = lambda race: None,
) -> Outcome:
    """Tune the items within `budget` seconds of the device's clock; write the winners to `file` if models are faster.

    samples: the log of measurements, to resume from. on_batch: called with the race after each batch.
    """
    gpu = device.facts.gpu
    races, replaces = [], {}
    for item in items:
        choice = item.call.choose(gpu)
        races.append(new_race(item, candidates(item, gpu, choice.config), device))
        if choice.source == str(file):
            replaces[item.key] = seal_of(file, item.op, item.bucket)
    session = Session(device, Log(samples), progress, budget)
    search(races, session, SEARCH_FRACTION * budget, on_batch)
    before = configs.pdl(gpu)
    outcome = Outcome(races, pdl=before)
    _confirm(outcome, targets, session)
    if gpu.capability >= configs.PDL_CAPABILITY and all(model.failure is None for model in outcome.models):
        _try_pdl(outcome, targets, session)
    outcome.written = outcome.accepted or outcome.pdl != before
    if outcome.written:
        measured = [race for race in races if _is_measured(race)] if outcome.accepted else []
        entries = [_new_entry(race, replaces.get(race.item.key)) for race in measured]
        merge(file, device.facts, entries, outcome.pdl if outcome.pdl_models else None)
        configs.forget()
    outcome.spent, outcome.counts = session.spent, dict(session.counts)
    return outcome


def winners(races: Sequence[Race]) -> Entries:
    """The configurations that are faster than their incumbents."""
    entries: dict[str, dict[str, Any]] = {}
    for race in races:
        if race.won:
            entries.setdefault(race.item.op, {})[race.item.bucket] = race.champion.config
    return entries


def _confirm(outcome: Outcome, targets: Sequence[Target], session: Session) -> None:
    """Time the models with and without the new configurations, and decide whether to accept these."""
    entries = winners(outcome.races)
    if not entries:
        outcome.why = "no candidate was faster than its incumbent"
        return
    outcome.models = [_time_model(target, ({}, outcome.pdl), (entries, outcome.pdl), session) for target in targets]
    failed = [model for model in outcome.models if model.failure is not None]
    slower = [model for model in outcome.models if model.outcome < 0]
    outcome.accepted = _is_faster(outcome.models)
    if failed:
        outcome.why = f"{failed[0].target.name} could not be timed: {failed[0].failure}"
    elif slower:
        outcome.why = f"{slower[0].target.name} became slower end to end"
    else:
        outcome.why = "faster end to end" if outcome.accepted else "no difference end to end above the noise"


def _try_pdl(outcome: Outcome, targets: Sequence[Target], session: Session) -> None:
    """Time the models with and without programmatic dependent launch; switch the setting if that is faster."""
    entries = winners(outcome.races) if outcome.accepted else {}
    pairs = (entries, outcome.pdl), (entries, not outcome.pdl)
    outcome.pdl_models = [_time_model(target, *pairs, session) for target in targets]
    if _is_faster(outcome.pdl_models):
        outcome.pdl = not outcome.pdl


def _is_faster(models: Sequence[ModelTiming]) -> bool:
    """Whether some model is faster, none is slower, and all could be timed."""
    return all(w.failure is None and w.outcome >= 0 for w in models) and any(w.outcome > 0 for w in models)


def _time_model(
    target: Target, before: tuple[Entries, bool], after: tuple[Entries, bool], session: Session
) -> ModelTiming:
    times: tuple[list[float], list[float]] = ([], [])

    def sample(which: int) -> float:
        times[which].append(session.sample_model(target, *(after if which else before)))
        return times[which][-1]

    try:
        result = compare_in_pairs(sample)
    except CandidateFailed as failed:
        return ModelTiming(target, math.nan, math.nan, 0, failed.failure)
    return ModelTiming(target, median(times[0]), median(times[1]), result)


def _is_measured(race: Race) -> bool:
    """Whether the race has a champion that passed the checks and was timed."""
    return race.batches > 0 and not race.has_failed(race.champion) and math.isfinite(race.champion_us)


def _new_entry(race: Race, replaces: str | None) -> NewEntry:
    item = race.item
    # An incumbent that failed has no timing; report no gain over it.
    incumbent_us = race.incumbent_us if math.isfinite(race.incumbent_us) else race.champion_us
    return NewEntry(
        type(item.call),
        item.bucket,
        race.champion.config,
        race.champion_us,
        incumbent_us,
        len(race.samples),
        replaces,
    )
