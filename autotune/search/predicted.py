"""Chooses launch configurations by predicted times, for a GPU that is not at hand (benchmarks/predict).

First all items with the heuristic's configuration; then, of those that take a noticeable part of the time, the best
candidates by the cost model; then, round by round, the neighbors of each item's best: configurations that differ from
it in one field. A configuration replaces the heuristic's if it is predicted to be faster by more than `LEAST_GAIN`.
Libraries' kernels cannot be predicted: they are no candidates, and an incumbent's are estimated from their floor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotune.items.candidates import Candidate, Candidates, candidates
from autotune.items.cost_model import predict as estimate
from autotune.items.work import Item, Target, calls_of_model, items, model_of
from autotune.search.store import NewEntry
from benchmarks.hardware import ceilings
from benchmarks.predict.cycles.machines import MACHINES, Machine
from benchmarks.predict.launches import program
from benchmarks.predict.model import Prediction
from benchmarks.predict.networks import LEAST_FOREIGN_US, LIBRARY_SHARE
from benchmarks.predict.store import Job
from tinysr_kernels.launch import hardware
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch

LEAST_GAIN = 0.05
"""A configuration predicted faster by less than this fraction is not preferred to the incumbent."""
NOTICEABLE = 0.002
"""Fraction of all predicted time from which on an item is searched."""

Predictor = Callable[[Iterable[Job]], Mapping[str, Prediction | str]]
"""Predictions of jobs by key: `store.predict_all` with its other arguments."""


@dataclass(eq=False)
class Search:
    """An item's candidates and the predicted microseconds of a call with some of them; infinite where there is none."""

    item: Item
    found: Candidates
    us: dict[str, float] = field(default_factory=dict)

    @property
    def incumbent_us(self) -> float:
        """Predicted with the heuristic's configuration, which files take precedence over."""
        return self.us[self.found.incumbent.key]

    @property
    def best(self) -> Candidate:
        """The fastest so far, if it is noticeably faster than the incumbent; else the incumbent."""
        fastest = min(self.tried, key=lambda one: self.us[one.key])
        return fastest if self.us[fastest.key] < (1 - LEAST_GAIN) * self.incumbent_us else self.found.incumbent

    @property
    def best_us(self) -> float:
        """Predicted with the best."""
        return self.us[self.best.key]

    @property
    def tried(self) -> list[Candidate]:
        """The candidates with a prediction, in the order of the space."""
        return [one for one in self.found.all if one.key in self.us]

    def neighbors(self) -> list[Candidate]:
        """Candidates without a prediction that differ from the fastest in one field."""
        fastest = min(self.tried, key=lambda one: self.us[one.key])
        return [one for one in self.found.all if one.key not in self.us and _distance(one.fields, fastest.fields) == 1]

    def entry(self) -> NewEntry | None:
        """What a configuration file says of the item; nothing where the incumbent stays."""
        if self.best is self.found.incumbent:
            return None
        return NewEntry(
            type(self.item.call), self.item.bucket, self.best.config, self.best_us, self.incumbent_us, len(self.us)
        )


def _distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    return sum(one[name] != other[name] for name in one)


def machine_of(gpu: Gpu) -> Machine:
    """The constants of the cycle model for a GPU: those fitted for its architecture, with this card's figures.

    ValueError if there are none. The L2's bytes per clock are scaled with the card's L2 rate, all else that all
    multiprocessors share with their number.
    """
    known = {one.name: one for one in hardware.CARDS}
    if gpu.arch not in MACHINES or gpu.name not in known:
        raise ValueError(f"{gpu.name}: times can be predicted for {', '.join(sorted(predictable()))}")
    fitted, card = MACHINES[gpu.arch], known[gpu.name]
    if card is fitted.card:
        return fitted
    clock = fitted.clock / fitted.card.clock * card.clock
    return dataclasses.replace(
        fitted,
        card=card,
        clock=clock,
        memory=fitted.memory / fitted.card.memory * card.memory,
        l2_rate=fitted.l2_rate * (card.l2 / card.clock) / (fitted.card.l2 / fitted.card.clock),
        starts=fitted.starts * card.multiprocessors / fitted.card.multiprocessors,
    )


def predictable() -> list[str]:
    """The names of the GPUs whose times can be predicted."""
    return [one.name for one in hardware.CARDS if one.arch in MACHINES]


def search(targets: Sequence[Target], gpu: Gpu, predict: Predictor, *, limit: int = 6, rounds: int = 2) -> list[Search]:
    """Search all items of the targets, the longest first. limit: candidates per item in the first and in later rounds.

    ValueError for a GPU whose times cannot be predicted, or if an incumbent's cannot.
    """
    machine = machine_of(gpu)
    models = [model_of(target) for target in targets]
    found = items(
        call for target, model in zip(targets, models, strict=True) for call in calls_of_model(model, target, gpu)
    )
    weights = frozenset(t.untyped_storage()._cdata for model in models for t in model.network.buffers())
    searches = [Search(item, candidates(item, gpu, item.call.heuristic(gpu))) for item in found]
    _predict([(one, [one.found.incumbent]) for one in searches], gpu, machine, weights, predict)
    for one in searches:
        if math.isinf(one.incumbent_us):
            raise ValueError(f"{one.item.key}: the time of its configuration cannot be predicted")
    total = sum(one.item.calls * one.incumbent_us for one in searches)
    chosen = [one for one in searches if one.item.calls * one.incumbent_us >= NOTICEABLE * total]
    for n in range(rounds + 1):
        wanted = [
            (one, _promising(one.neighbors() if n else one.found.all[1:], one.item, gpu, limit)) for one in chosen
        ]
        _predict(wanted, gpu, machine, weights, predict)
    return sorted(searches, key=lambda one: -one.item.calls * one.incumbent_us)


def _promising(some: Iterable[Candidate], item: Item, gpu: Gpu, limit: int) -> list[Candidate]:
    """The best by the cost model, without those of libraries."""
    most = ceilings(gpu)
    own = (one for one in some if not one.library)
    return sorted(own, key=lambda one: estimate(item, one, gpu, most))[:limit]


def _predict(
    wanted: Sequence[tuple[Search, Sequence[Candidate]]],
    gpu: Gpu,
    machine: Machine,
    weights: frozenset[int],
    predict: Predictor,
) -> None:
    """Predict candidates, all in one go, and note their times. A launch costs the gap to the next one too."""
    jobs = {
        (id(one), candidate.key): [
            Job(program(launch, gpu.arch, weights), machine)
            for launch in candidate.plan.launches
            if isinstance(launch, Launch)
        ]
        for one, some in wanted
        for candidate in some
    }
    made, most = predict(job for some in jobs.values() for job in some), ceilings(gpu)
    for one, some in wanted:
        for candidate in some:
            times = [_usable_us(made[job.key], gpu) for job in jobs[id(one), candidate.key]]
            if candidate.library:
                floor = 1e6 * most.floor(one.item.cost, one.item.bits)
                times.append(max(LEAST_FOREIGN_US, floor / LIBRARY_SHARE))
            one.us[candidate.key] = sum(times) + 1e6 * machine.gap * candidate.plan.kernels


def _usable_us(made: Prediction | str, gpu: Gpu) -> float:
    """Microseconds of a launch; infinite if it spills, needs too much shared memory, or is not predicted."""
    if isinstance(made, str) or made.spilled or made.shared_bytes > gpu.shared_limit:
        return math.inf
    return made.us
