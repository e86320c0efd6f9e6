"""Finds the fastest correct configuration of each item; the budget goes where the most end-to-end time can be gained.

An item's candidates are ordered by the cost model, compiled 32 at a time, and raced in batches by successive halving:
a few samples of each in turn, drop the slower half, repeat. The winner of a batch is compared in pairs with the
champion (the fastest so far, at first the incumbent), and replaces it only if it wins significantly more pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from autotune.items.candidates import Candidate, Candidates
from autotune.items.cost_model import LAUNCH, predict
from autotune.items.device import Device
from autotune.items.results import Failure
from autotune.items.work import Item
from autotune.search.session import CandidateFailed, Session

CHUNK = 32
"""Candidates of an item that are compiled together, best by the cost model first."""
BATCH = 8
ROUNDS = (3, 3, 6)
"""Samples of each candidate before the first, second and third halving."""
CUTOFF = 1.5
"""A candidate slower than this multiple of the batch's best is dropped at once."""
WIN_THRESHOLDS = ((8, 8), (16, 14), (32, 25))
"""(pairs, wins that decide after them). Candidates of equal speed reach these in 0.4, 0.2 and 0.1 % of comparisons."""
EXPECTED_GAIN = 0.3
"""Fraction of the distance to the floor that the next batch is expected to gain; halved per batch without gain."""
DEFAULT_FLOOR_RATIO = 2.0
"""Assumed time of a call relative to its floor, until one is measured."""
DEFAULT_BATCH_SECONDS = 5.0


@dataclass
class Race:
    """State of an item. uncompiled, compiled: candidates not yet compiled, and not yet raced; most promising first."""

    item: Item
    candidates: Candidates
    floor_us: float
    champion: Candidate
    uncompiled: list[Candidate]
    compiled: list[Candidate] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Candidate, Failure]] = field(default_factory=list)
    samples: dict[str, list[float]] = field(default_factory=dict)
    stale_batches: int = 0
    batches: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether no candidate is left to try."""
        return not self.compiled and not self.uncompiled and self.batches > 0

    @property
    def won(self) -> bool:
        """Whether a new configuration is faster than the incumbent."""
        return self.champion is not self.candidates.incumbent

    def time_us(self, candidate: Candidate) -> float:
        """Median of all samples; infinite without samples."""
        return median(self.samples.get(candidate.key) or [math.inf])

    @property
    def champion_us(self) -> float:
        """Microseconds per call with the champion."""
        return self.time_us(self.champion)

    @property
    def incumbent_us(self) -> float:
        """Microseconds per call with the incumbent."""
        return self.time_us(self.candidates.incumbent)

    def has_failed(self, candidate: Candidate) -> bool:
        """Whether a candidate failed."""
        return any(c is candidate for c, _ in self.failures)

    def restore_incumbent(self) -> None:
        """Make the incumbent the champion again if the champion has failed since."""
        if self.has_failed(self.champion):
            self.champion = self.candidates.incumbent

    def gain_rate(self, floor_ratio: float) -> float:
        """Expected gain of the next batch: microseconds, over all calls, per second of the budget.

        floor_ratio: assumed time of a call relative to its floor, for an item without samples.
        """
        now = self.champion_us if math.isfinite(self.champion_us) else self.floor_us * floor_ratio
        seconds = self.seconds / self.batches if self.batches else DEFAULT_BATCH_SECONDS
        return (
            self.item.calls
            * max(now - self.floor_us, 0.02 * now)
            * EXPECTED_GAIN
            * 0.5**self.stale_batches
            / max(seconds, 1e-3)
        )


def new_race(item: Item, candidates: Candidates, device: Device) -> Race:
    """A race without any samples."""
    others = candidates.all[1:]
    # Library candidates are measured first, because the model cannot predict them.
    first = [c for c in others if c.library]
    rest = [c for c in others if not c.library]
    rest.sort(key=lambda c: predict(item, c, device.facts.gpu, device.ceilings))
    floor = 1e6 * (device.ceilings.floor(item.cost, item.bits) + LAUNCH)
    removed = Counter(candidates.removed)
    return Race(item, candidates, floor, candidates.incumbent, uncompiled=[*first, *rest], removed=removed)


def search(races: Sequence[Race], session: Session, budget: float, on_batch: Callable[[Race], None]) -> None:
    """Run batches until the budget is spent or no candidate is left. on_batch: called with the race after a batch."""
    while session.spent < budget:
        waiting = [race for race in races if not race.done]
        if not waiting:
            return
        known = [race.incumbent_us / race.floor_us for race in races if math.isfinite(race.incumbent_us)]
        floor_ratio = median(known or [DEFAULT_FLOOR_RATIO])
        race = max(waiting, key=lambda race: race.gain_rate(floor_ratio))
        before = session.spent
        _batch(race, session, budget)
        race.batches += 1
        race.seconds += session.spent - before
        on_batch(race)


def _batch(race: Race, session: Session, budget: float) -> None:
    """Compile if necessary, race the next candidates, and let the best of them challenge the champion."""
    if not race.batches:
        _is_correct(race, session, race.candidates.incumbent)
    if not race.compiled:
        race.compiled = _compile(race, session)
    chosen, race.compiled = race.compiled[:BATCH], race.compiled[BATCH:]
    rivals = []
    while chosen and session.spent < budget:  # a candidate may hang until its timeout
        candidate = chosen.pop(0)
        if _is_correct(race, session, candidate):
            rivals.append(candidate)
    race.compiled = chosen + race.compiled
    race.restore_incumbent()
    race.stale_batches += 1
    while _challenge(race, session, rivals, budget):
        rivals = [c for c in rivals if not race.has_failed(c)]
    race.restore_incumbent()


def _challenge(race: Race, session: Session, rivals: Sequence[Candidate], budget: float) -> bool:
    """Let the best of a batch challenge the champion. True if it failed: the caller tries the next best."""
    unopposed = race.has_failed(race.champion)
    best = _successive_halving(race, session, rivals if unopposed else [*rivals, race.champion], budget)
    if best is None or best is race.champion or session.spent >= budget:
        return False
    if _beats_champion(race, session, best, unopposed):
        race.champion, race.stale_batches = best, 0
    return race.has_failed(best)


def _compile(race: Race, session: Session) -> list[Candidate]:
    """The next chunk's candidates that compile without faults, in the order of the cost model."""
    item, device = race.item, session.device
    taken, race.uncompiled = race.uncompiled[:CHUNK], race.uncompiled[CHUNK:]
    clean = []
    for candidate, built in zip(taken, session.built(item, taken), strict=True):
        if built.faults:
            race.removed[built.faults[0]] += 1
        else:
            clean.append((predict(item, candidate, device.facts.gpu, device.ceilings, built), candidate))
    return [candidate for _, candidate in sorted(clean, key=lambda pair: pair[0])]


def _is_correct(race: Race, session: Session, candidate: Candidate, draw: int = 0) -> bool:
    """Whether the candidate's outputs are correct; if not, it is eliminated."""
    try:
        session.check(race.item, candidate, draw)
    except CandidateFailed as failed:
        _eliminate(race, candidate, failed.failure)
        return False
    return True


def _sample(race: Race, session: Session, candidate: Candidate, batch_samples: dict[str, list[float]]) -> float:
    """One more sample; infinite if the candidate fails, which eliminates it."""
    try:
        us = session.sample(race.item, candidate)
    except CandidateFailed as failed:
        _eliminate(race, candidate, failed.failure)
        return math.inf
    batch_samples.setdefault(candidate.key, []).append(us)
    race.samples.setdefault(candidate.key, []).append(us)
    return us


def _eliminate(race: Race, candidate: Candidate, failure: Failure) -> None:
    if not race.has_failed(candidate):
        race.failures.append((candidate, failure))
        race.removed[failure.kind] += 1


def _successive_halving(race: Race, session: Session, rivals: Sequence[Candidate], budget: float) -> Candidate | None:
    """The fastest of some candidates by successive halving, or None if none is left or the budget is spent.

    The champion takes part for comparison and is never dropped.
    """
    left = list(rivals)
    batch_samples: dict[str, list[float]] = {}
    for samples in ROUNDS:
        for _ in range(samples):
            left = [c for c in left if math.isfinite(_sample(race, session, c, batch_samples))]
        if not left or session.spent >= budget:
            return None
        left.sort(key=lambda c: median(batch_samples[c.key]))
        cutoff = CUTOFF * median(batch_samples[left[0].key])
        kept = left[: max((len(left) + 1) // 2, 2)]
        left = [c for c in kept if median(batch_samples[c.key]) <= cutoff]
        if race.champion in rivals and race.champion not in left and not race.has_failed(race.champion):
            left.append(race.champion)
    return min(left, key=lambda c: median(batch_samples[c.key]))


def _beats_champion(race: Race, session: Session, rival: Candidate, unopposed: bool) -> bool:
    """Whether a rival replaces the champion: correct on other inputs too, and significantly faster."""
    if not _is_correct(race, session, rival, draw=1):
        return False
    if unopposed:
        return True
    batch_samples: dict[str, list[float]] = {}

    return (
        compare_in_pairs(lambda c: _sample(race, session, (race.champion, rival)[c], batch_samples), early_stop=True)
        > 0
    )


def compare_in_pairs(sample: Callable[[int], float], early_stop: bool = False) -> int:
    """1 if the challenger wins significantly more pairs of samples, -1 if it loses significantly more, else 0.

    sample: takes the next sample of the champion (0) or of the challenger (1). Samples alternate, so that both see the
    same drift of clock and temperature, and so does the order within a pair. early_stop: end when half the pairs are
    lost.
    """
    wins = done = 0
    for pairs, needed in WIN_THRESHOLDS:
        while done < pairs:
            first = done % 2
            times = {first: sample(first), 1 - first: sample(1 - first)}
            wins += times[1] < times[0]
            done += 1
        if wins >= needed:
            return 1
        if done - wins >= needed:
            return -1
        if early_stop and 2 * wins <= pairs:
            return 0
    return 0
