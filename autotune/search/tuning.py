"""A whole run: races for every item, the models timed end to end with the outcome, and the file if it wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from autotune.items.answers import Failure
from autotune.items.candidates import candidates
from autotune.items.device import Device, Entries
from autotune.items.log import Log
from autotune.items.work import Item, Target
from autotune.search.search import Race, contest, search, start
from autotune.search.session import Failed, Session
from autotune.search.store import Found, merge, seal_of
from tinysr_kernels.launch import configs

FOR_SEARCH = 0.9
"""Part of the budget for the races; the models end to end take the rest."""


@dataclass(frozen=True)
class Whole:
    """A model end to end, in microseconds, before and after. outcome: 1 faster, -1 slower, 0 no difference beyond luck.

    failure: why it could not be timed.
    """

    target: Target
    before_us: float
    after_us: float
    outcome: int
    failure: Failure | None = None


@dataclass
class Outcome:
    """What a run did. kept: whether the configurations are in use from now on; why: the reason in words. written:
    whether the file is another than before.

    pdl: whether launches are programmatic dependent ones from now on; pdl_wholes: the models as before and the other
    way round, where that was tried.
    """

    races: list[Race]
    wholes: list[Whole] = field(default_factory=list)
    kept: bool = False
    why: str = ""
    written: bool = False
    pdl: bool = False
    pdl_wholes: list[Whole] = field(default_factory=list)
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
    say: Callable[[Race], None] = lambda race: None,
) -> Outcome:
    """Tune the items within `budget` seconds of the device's clock and write what wins end to end into `file`.

    samples: where every measurement is kept, and taken from where an earlier run made it.
    """
    gpu = device.facts.gpu
    races, beaten = [], {}
    for item in items:
        choice = item.call.choose(gpu)
        races.append(start(item, candidates(item, gpu, choice.config), device))
        if choice.source == str(file):
            beaten[item.key] = seal_of(file, item.op, item.bucket)
    session = Session(device, Log(samples), progress, budget)
    search(races, session, FOR_SEARCH * budget, say)
    before = configs.pdl(gpu)
    outcome = Outcome(races, pdl=before)
    _confirm(outcome, targets, session)
    if gpu.capability >= configs.PDL_CAPABILITY and all(whole.failure is None for whole in outcome.wholes):
        _try_pdl(outcome, targets, session)
    outcome.written = outcome.kept or outcome.pdl != before
    if outcome.written:
        settled = [race for race in races if _settled(race)] if outcome.kept else []
        found = [_found(race, beaten.get(race.item.key)) for race in settled]
        merge(file, device.facts, found, outcome.pdl if outcome.pdl_wholes else None)
        configs.forget()
    outcome.spent, outcome.counts = session.spent, dict(session.counts)
    return outcome


def winners(races: Sequence[Race]) -> Entries:
    """The configurations that beat their incumbents."""
    entries: dict[str, dict[str, Any]] = {}
    for race in races:
        if race.won:
            entries.setdefault(race.item.op, {})[race.item.bucket] = race.champion.config
    return entries


def _confirm(outcome: Outcome, targets: Sequence[Target], session: Session) -> None:
    """Time the models with and without the new configurations; decide whether the file is kept."""
    entries = winners(outcome.races)
    if not entries:
        outcome.why = "nothing was faster than what is there"
        return
    outcome.wholes = [_whole(target, ({}, outcome.pdl), (entries, outcome.pdl), session) for target in targets]
    failed = [whole for whole in outcome.wholes if whole.failure is not None]
    slower = [whole for whole in outcome.wholes if whole.outcome < 0]
    outcome.kept = _wins(outcome.wholes)
    if failed:
        outcome.why = f"{failed[0].target.name} could not be timed: {failed[0].failure}"
    elif slower:
        outcome.why = f"{slower[0].target.name} became slower end to end"
    else:
        outcome.why = "faster end to end" if outcome.kept else "no difference end to end beyond the noise"


def _try_pdl(outcome: Outcome, targets: Sequence[Target], session: Session) -> None:
    """Time the models with programmatic dependent launches and without; what is not in use takes over if it wins."""
    entries = winners(outcome.races) if outcome.kept else {}
    pairs = (entries, outcome.pdl), (entries, not outcome.pdl)
    outcome.pdl_wholes = [_whole(target, *pairs, session) for target in targets]
    if _wins(outcome.pdl_wholes):
        outcome.pdl = not outcome.pdl


def _wins(wholes: Sequence[Whole]) -> bool:
    """Whether some model became faster, none slower, and all could be timed."""
    return all(w.failure is None and w.outcome >= 0 for w in wholes) and any(w.outcome > 0 for w in wholes)


def _whole(target: Target, before: tuple[Entries, bool], after: tuple[Entries, bool], session: Session) -> Whole:
    times: tuple[list[float], list[float]] = ([], [])

    def read(which: int) -> float:
        times[which].append(session.whole(target, *(after if which else before)))
        return times[which][-1]

    try:
        result = contest(read)
    except Failed as failed:
        return Whole(target, math.nan, math.nan, 0, failed.failure)
    return Whole(target, median(times[0]), median(times[1]), result)


def _settled(race: Race) -> bool:
    """Whether the race has a champion that was measured and found right."""
    return race.batches > 0 and not race.is_out(race.champion) and math.isfinite(race.champion_us)


def _found(race: Race, beaten: str | None) -> Found:
    item = race.item
    # An incumbent that failed has no time; what took its place then gains nothing.
    incumbent_us = race.incumbent_us if math.isfinite(race.incumbent_us) else race.champion_us
    return Found(
        type(item.call),
        item.bucket,
        race.champion.config,
        race.champion_us,
        incumbent_us,
        len(race.readings),
        beaten,
    )
