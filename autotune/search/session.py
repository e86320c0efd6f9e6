"""Measures what the search asks for: first from the log of an earlier run, then on the device, within a budget.

The log gives the same answers in the same order, and the search decides by nothing else: a run that was killed goes on
where it was, and what it spent before counts.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tinysr_kernels
from autotune.items.answers import Failure, Sample
from autotune.items.candidates import Candidate
from autotune.items.cost_model import Built
from autotune.items.device import Device, Entries
from autotune.items.log import Key, Log
from autotune.items.work import Item, Target
from tinysr_kernels.launch.config_file import hashes_of
from tinysr_kernels.ops import REGISTRY

RETAKES = 5
"""Times that a disturbed sample is taken again, after 1, 2, 4, ... seconds. While the disturbance lasts, each further
sample is taken again once: a neighbour who stays must not cost the budget."""


@functools.cache
def _networks() -> str:
    """Identifies what surrounds the kernels in a whole model: the source of its networks and of what runs them."""
    package = Path(tinysr_kernels.__file__).parent
    files = [path for folder in ("nets", "runtime") for path in sorted((package / folder).glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


class Failed(Exception):
    """A candidate is out of the race."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.detail}")
        self.failure = failure


class Session:
    """One tuning run on one device. Every method spends from the budget, which the search watches.

    budget: in seconds; beyond it nothing is waited for.
    """

    def __init__(
        self,
        device: Device,
        log: Log,
        progress: Callable[[float], None] = lambda spent: None,
        budget: float = math.inf,
    ) -> None:
        self.device = device
        self.log = log
        self.budget = budget
        self.spent = 0.0
        self.counts: Counter[str] = Counter()
        self._progress = progress
        self._retakes = RETAKES
        self._failed: dict[tuple[str, str], Failure] = {}
        self._stamps: dict[tuple[str, ...], str] = {}

    def built(self, item: Item, candidates: Sequence[Candidate]) -> list[Built]:
        """What ahead-of-time compilation finds for each candidate."""
        stamp = self._stamp(item.op)
        known = [self._recall(("build", item.key, c.key), stamp) for c in candidates]
        missing = [c for c, record in zip(candidates, known, strict=True) if record is None]
        started = self.device.clock()
        fresh = iter(self.device.build(item, missing) if missing else ())
        seconds = (self.device.clock() - started) / max(len(missing), 1)
        found = []
        for candidate, record in zip(candidates, known, strict=True):
            if record is None:
                built = next(fresh)
                values = {"resources": built.resources, "faults": built.faults}
                record = self._note(("build", item.key, candidate.key), stamp, seconds, **values)
            found.append(Built(tuple(map(tuple, record["resources"])), tuple(record["faults"])))
        return found

    def check(self, item: Item, candidate: Candidate, draw: int = 0) -> None:
        """Compare with the reference on random inputs, others for another draw. Failed if it differs or breaks."""
        self._raise_if_failed(item, candidate)
        key = (f"check {draw}", item.key, candidate.key)
        record = self._measured(key, self._stamp(item.op), lambda: self.device.check(item, candidate, draw))
        self._settle(item, candidate, record)

    def sample(self, item: Item, candidate: Candidate) -> float:
        """Microseconds of a call, the next reading. Failed if it breaks, then and ever after."""
        self._raise_if_failed(item, candidate)
        key = ("sample", item.key, candidate.key)
        record = self._measured(key, self._stamp(item.op), lambda: self.device.sample(item, candidate))
        self._settle(item, candidate, record)
        return float(record["us"])

    def whole(self, target: Target, entries: Entries, pdl: bool) -> float:
        """Microseconds of a whole model with these configurations, the next reading. Failed if it breaks."""
        given = {op: {b: vars(c) for b, c in sorted(some.items())} for op, some in sorted(entries.items())}
        digest = hashlib.sha256(json.dumps([given, pdl], sort_keys=True).encode()).hexdigest()[:16]
        stamp = f"{self._stamp(*sorted(REGISTRY))} {_networks()}"
        record = self._measured(("whole", target.name, digest), stamp, lambda: self.device.whole(target, entries, pdl))
        if "failure" in record:
            raise Failed(Failure(*record["failure"]))
        return float(record["us"])

    def _measured(self, key: Key, stamp: str, measure: Callable[[], Sample | Failure | None]) -> dict[str, Any]:
        """A record of the log, or a new one, in which disturbed readings stand beside the one that counts."""
        record = self._recall(key, stamp)
        if record is not None:
            return record
        started = self.device.clock()
        readings = [measure()]
        while isinstance(last := readings[-1], Sample) and last.disturbed and len(readings) <= self._retakes:
            pause = float(1 << (len(readings) - 1))
            if self.spent + self.device.clock() - started + pause > self.budget:
                break
            self.device.wait(pause)
            readings.append(measure())
        seconds = self.device.clock() - started
        values: dict[str, Any] = {}
        if isinstance(last, Failure):
            values["failure"] = [last.kind, last.detail]
        elif isinstance(last, Sample):
            values |= {"us": last.us, "clock": last.clock, "disturbed": last.disturbed}
            thrown = [r for r in readings[:-1] if isinstance(r, Sample)]
            values["retaken"] = [[r.us, r.clock, r.disturbed] for r in thrown]
        return self._note(key, stamp, seconds, **values)

    def _recall(self, key: Key, stamp: str) -> dict[str, Any] | None:
        record = self.log.next(key, stamp)
        if record is not None:
            self._spend(record, "recalled")
        return record

    def _note(self, key: Key, stamp: str, seconds: float, **values: Any) -> dict[str, Any]:
        record = self.log.add(key, stamp, seconds=seconds, **values)
        self._spend(record, "measured")
        return record

    def _spend(self, record: dict[str, Any], how: str) -> None:
        self.spent += record["seconds"]
        self.counts[how] += 1
        self.counts[f"{record['what'].split()[0]}s"] += 1
        self.counts["retaken"] += len(record.get("retaken", ()))
        if "us" in record:
            disturbed = bool(record.get("disturbed"))
            self._retakes = 1 if disturbed else RETAKES
            self.counts["still disturbed"] += disturbed
        self._progress(self.spent)

    def _settle(self, item: Item, candidate: Candidate, record: dict[str, Any]) -> None:
        if "failure" in record:
            self._failed[item.key, candidate.key] = Failure(*record["failure"])
            self._raise_if_failed(item, candidate)

    def _raise_if_failed(self, item: Item, candidate: Candidate) -> None:
        failure = self._failed.get((item.key, candidate.key))
        if failure is not None:
            raise Failed(failure)

    def _stamp(self, *ops: str) -> str:
        """What measurements of these operations depend on, besides the item and the configuration."""
        if ops not in self._stamps:
            hashes = [hashes_of(REGISTRY[op]) for op in ops]
            facts = self.device.facts
            text = json.dumps([hashes, str(facts.gpu), facts.triton, facts.torch, facts.driver, facts.power_limit_w])
            self._stamps[ops] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._stamps[ops]
