"""Finds the fastest right configuration of each item, spending the budget where most of the end-to-end time is to gain.

An item's candidates are compiled a few dozen at a time, ordered by the model and raced in batches. A batch is a
successive halving: a few readings of each in turn, the slower half out, more readings of the rest. What is left meets
the champion (at first the incumbent) in a contest of readings taken in turn, and takes its place only if luck alone
would not explain its wins.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from autotune.items.answers import Failure
from autotune.items.candidates import Candidate, Candidates
from autotune.items.cost_model import LAUNCH, predict
from autotune.items.device import Device
from autotune.items.work import Item
from autotune.search.session import Failed, Session

CHUNK = 32
"""Candidates of an item that are compiled together, the best by the model before those that follow."""
BATCH = 8
ROUNDS = (3, 3, 6)
"""Readings of each candidate before the first, second and third halving."""
HOPELESS = 1.5
"""Times the best of a batch's first readings beyond which a candidate leaves at once."""
DUEL = ((8, 8), (16, 14), (32, 25))
"""After so many pairs so many wins decide: equal rivals get there in 0.4, 0.2 and 0.1 % of duels."""
HOPE = 0.3
"""Part of the distance to the floor that the first batch of an item is expected to gain, halved by each in vain."""
GUESS = 2.0
"""Times its floor that a call is taken to need until one was measured."""
FIRST_GUESS_SECONDS = 5.0


@dataclass
class Race:
    """An item's state. raw: candidates not compiled yet; rivals: compiled ones not raced yet; most promising first."""

    item: Item
    candidates: Candidates
    floor_us: float
    champion: Candidate
    raw: list[Candidate]
    rivals: list[Candidate] = field(default_factory=list)
    removed: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[Candidate, Failure]] = field(default_factory=list)
    readings: dict[str, list[float]] = field(default_factory=dict)
    vain: int = 0
    batches: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether nothing is left to try."""
        return not self.rivals and not self.raw and self.batches > 0

    @property
    def won(self) -> bool:
        """Whether a new configuration beat the incumbent."""
        return self.champion is not self.candidates.incumbent

    def time_us(self, candidate: Candidate) -> float:
        """Median of all readings; infinite for what was never read."""
        return median(self.readings.get(candidate.key) or [math.inf])

    @property
    def champion_us(self) -> float:
        """The time of a call as it is now."""
        return self.time_us(self.champion)

    @property
    def incumbent_us(self) -> float:
        """The time of a call as it was."""
        return self.time_us(self.candidates.incumbent)

    def is_out(self, candidate: Candidate) -> bool:
        """Whether a candidate failed."""
        return any(c is candidate for c, _ in self.failures)

    def replace_fallen_champion(self) -> None:
        """The incumbent runs again where what beat it failed later."""
        if self.is_out(self.champion):
            self.champion = self.candidates.incumbent

    def hope(self, usual: float) -> float:
        """Microseconds of all calls that the next batch may gain, for each second that it may take.

        usual: how many times its floor a call takes; for an item that nobody has measured yet.
        """
        now = self.champion_us if math.isfinite(self.champion_us) else self.floor_us * usual
        seconds = self.seconds / self.batches if self.batches else FIRST_GUESS_SECONDS
        return self.item.calls * max(now - self.floor_us, 0.02 * now) * HOPE * 0.5**self.vain / max(seconds, 1e-3)


def start(item: Item, candidates: Candidates, device: Device) -> Race:
    """A race that nobody has run in yet."""
    others = candidates.all[1:]
    # What a library does is compared at once, whatever the model thinks of it.
    first = [c for c in others if c.library]
    rest = [c for c in others if not c.library]
    rest.sort(key=lambda c: predict(item, c, device.facts.gpu, device.ceilings))
    floor = 1e6 * (device.ceilings.floor(item.cost, item.bits) + LAUNCH)
    removed = Counter(candidates.removed)
    return Race(item, candidates, floor, candidates.incumbent, raw=[*first, *rest], removed=removed)


def search(races: Sequence[Race], session: Session, budget: float, say: Callable[[Race], None]) -> None:
    """Run batches until the budget is spent or nothing is left to try; `say` hears of each batch."""
    while session.spent < budget:
        waiting = [race for race in races if not race.done]
        if not waiting:
            return
        known = [race.incumbent_us / race.floor_us for race in races if math.isfinite(race.incumbent_us)]
        usual = median(known or [GUESS])
        race = max(waiting, key=lambda race: race.hope(usual))
        before = session.spent
        _batch(race, session, budget)
        race.batches += 1
        race.seconds += session.spent - before
        say(race)


def _batch(race: Race, session: Session, budget: float) -> None:
    """Compile if need be, race the next few candidates, and let the best of them challenge the champion."""
    if not race.batches:
        _right(race, session, race.candidates.incumbent)
    if not race.rivals:
        race.rivals = _compile(race, session)
    chosen, race.rivals = race.rivals[:BATCH], race.rivals[BATCH:]
    rivals = []
    while chosen and session.spent < budget:  # each of them may hang until it is stopped
        candidate = chosen.pop(0)
        if _right(race, session, candidate):
            rivals.append(candidate)
    race.rivals = chosen + race.rivals
    race.replace_fallen_champion()
    race.vain += 1
    while _challenge(race, session, rivals, budget):
        rivals = [c for c in rivals if not race.is_out(c)]
    race.replace_fallen_champion()


def _challenge(race: Race, session: Session, rivals: Sequence[Candidate], budget: float) -> bool:
    """Let the best of a batch challenge the champion. True if it failed instead: then another is the best."""
    unopposed = race.is_out(race.champion)
    best = _halve(race, session, rivals if unopposed else [*rivals, race.champion], budget)
    if best is None or best is race.champion or session.spent >= budget:
        return False
    if _takes_over(race, session, best, unopposed):
        race.champion, race.vain = best, 0
    return race.is_out(best)


def _compile(race: Race, session: Session) -> list[Candidate]:
    """The next chunk's candidates whose code is clean, in the model's order."""
    item, device = race.item, session.device
    taken, race.raw = race.raw[:CHUNK], race.raw[CHUNK:]
    clean = []
    for candidate, built in zip(taken, session.built(item, taken), strict=True):
        if built.faults:
            race.removed[built.faults[0]] += 1
        else:
            clean.append((predict(item, candidate, device.facts.gpu, device.ceilings, built), candidate))
    return [candidate for _, candidate in sorted(clean, key=lambda pair: pair[0])]


def _right(race: Race, session: Session, candidate: Candidate, draw: int = 0) -> bool:
    """Whether its results are right; if not, it is out."""
    try:
        session.check(race.item, candidate, draw)
    except Failed as failed:
        _count_out(race, candidate, failed.failure)
        return False
    return True


def _read(race: Race, session: Session, candidate: Candidate, fresh: dict[str, list[float]]) -> float:
    """One more reading; infinite if the candidate fails, and then it is out."""
    try:
        us = session.sample(race.item, candidate)
    except Failed as failed:
        _count_out(race, candidate, failed.failure)
        return math.inf
    fresh.setdefault(candidate.key, []).append(us)
    race.readings.setdefault(candidate.key, []).append(us)
    return us


def _count_out(race: Race, candidate: Candidate, failure: Failure) -> None:
    if not race.is_out(candidate):
        race.failures.append((candidate, failure))
        race.removed[failure.kind] += 1


def _halve(race: Race, session: Session, rivals: Sequence[Candidate], budget: float) -> Candidate | None:
    """The fastest of some candidates by successive halving, or None if none is left or the budget is spent.

    The champion runs along for comparison and is never left out.
    """
    left = list(rivals)
    fresh: dict[str, list[float]] = {}
    for readings in ROUNDS:
        for _ in range(readings):
            left = [c for c in left if math.isfinite(_read(race, session, c, fresh))]
        if not left or session.spent >= budget:
            return None
        left.sort(key=lambda c: median(fresh[c.key]))
        hopeless = HOPELESS * median(fresh[left[0].key])
        kept = left[: max((len(left) + 1) // 2, 2)]
        left = [c for c in kept if median(fresh[c.key]) <= hopeless]
        if race.champion in rivals and race.champion not in left and not race.is_out(race.champion):
            left.append(race.champion)
    return min(left, key=lambda c: median(fresh[c.key]))


def _takes_over(race: Race, session: Session, rival: Candidate, unopposed: bool) -> bool:
    """Whether a rival takes the champion's place: right on other inputs too, and faster beyond luck."""
    if not _right(race, session, rival, draw=1):
        return False
    if unopposed:
        return True
    fresh: dict[str, list[float]] = {}

    return contest(lambda c: _read(race, session, (race.champion, rival)[c], fresh), give_up=True) > 0


def contest(read: Callable[[int], float], give_up: bool = False) -> int:
    """1 if the challenger wins more pairs of readings than chance explains, -1 if it loses as many, else 0.

    read: the next reading of the champion (0) or of the challenger (1). They are read in turn, so that both have the
    same drifts of clock and temperature, and take turns at being first. give_up: end once half the pairs are lost.
    """
    wins = fought = 0
    for pairs, needed in DUEL:
        while fought < pairs:
            first = fought % 2
            times = {first: read(first), 1 - first: read(1 - first)}
            wins += times[1] < times[0]
            fought += 1
        if wins >= needed:
            return 1
        if fought - wins >= needed:
            return -1
        if give_up and 2 * wins <= pairs:
            return 0
    return 0
