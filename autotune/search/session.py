"""Serves the search's measurements: first from the log of an earlier run, then from the device, within a budget.

The log returns the same results in the same order and the search depends on nothing else, so a run that was killed
resumes where it stopped. Time spent before counts towards the budget.
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
from autotune.items.candidates import Candidate
from autotune.items.cost_model import Built
from autotune.items.device import Device, Entries
from autotune.items.log import Key, Log
from autotune.items.results import Failure, Sample
from autotune.items.work import Item, Target
from tinysr_kernels.launch.config_file import hashes_of
from tinysr_kernels.ops import REGISTRY

RETRIES = 5
"""Retries of a disturbed sample, after 1, 2, 4, ... seconds. While the disturbance lasts, each further sample is
retried once only: another process that stays on the GPU must not use up the budget."""


@functools.cache
def _network_hash() -> str:
    """Hash of the code around the kernels in a whole model: the source of nets/ and runtime/."""
    package = Path(tinysr_kernels.__file__).parent
    files = [path for folder in ("nets", "runtime") for path in sorted((package / folder).glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


class CandidateFailed(Exception):
    """A candidate failed and is eliminated."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.kind}: {failure.detail}")
        self.failure = failure


class Session:
    """One tuning run on one device. Every method adds its time to `spent`, which the search compares with the budget.

    budget: in seconds; a retry that would exceed it is skipped. progress: called with `spent` after each measurement.
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
        self._retries = RETRIES
        self._failed: dict[tuple[str, str], Failure] = {}
        self._stamps: dict[tuple[str, ...], str] = {}

    def built(self, item: Item, candidates: Sequence[Candidate]) -> list[Built]:
        """The result of ahead-of-time compilation for each candidate."""
        stamp = self._stamp(item.op)
        known = [self._replay(("build", item.key, c.key), stamp) for c in candidates]
        missing = [c for c, record in zip(candidates, known, strict=True) if record is None]
        started = self.device.clock()
        fresh = iter(self.device.build(item, missing) if missing else ())
        seconds = (self.device.clock() - started) / max(len(missing), 1)
        found = []
        for candidate, record in zip(candidates, known, strict=True):
            if record is None:
                built = next(fresh)
                values = {"resources": built.resources, "faults": built.faults}
                record = self._record(("build", item.key, candidate.key), stamp, seconds, **values)
            found.append(Built(tuple(map(tuple, record["resources"])), tuple(record["faults"])))
        return found

    def check(self, item: Item, candidate: Candidate, draw: int = 0) -> None:
        """Compare with the reference on random inputs of seed `draw`. CandidateFailed if it differs or breaks."""
        self._raise_if_failed(item, candidate)
        key = (f"check {draw}", item.key, candidate.key)
        record = self._measured(key, self._stamp(item.op), lambda: self.device.check(item, candidate, draw))
        self._check_record(item, candidate, record)

    def sample(self, item: Item, candidate: Candidate) -> float:
        """The next timing sample, in microseconds per call. CandidateFailed if it breaks, now and in later calls."""
        self._raise_if_failed(item, candidate)
        key = ("sample", item.key, candidate.key)
        record = self._measured(key, self._stamp(item.op), lambda: self.device.sample(item, candidate))
        self._check_record(item, candidate, record)
        return float(record["us"])

    def sample_model(self, target: Target, entries: Entries, pdl: bool) -> float:
        """The next timing sample of a whole model with these overrides, in us per run. CandidateFailed if it breaks."""
        overrides = {op: {b: vars(c) for b, c in sorted(some.items())} for op, some in sorted(entries.items())}
        digest = hashlib.sha256(json.dumps([overrides, pdl], sort_keys=True).encode()).hexdigest()[:16]
        stamp = f"{self._stamp(*sorted(REGISTRY))} {_network_hash()}"
        record = self._measured(
            ("model", target.name, digest), stamp, lambda: self.device.sample_model(target, entries, pdl)
        )
        if "failure" in record:
            raise CandidateFailed(Failure(*record["failure"]))
        return float(record["us"])

    def _measured(self, key: Key, stamp: str, measure: Callable[[], Sample | Failure | None]) -> dict[str, Any]:
        """A record from the log, or a new one: the sample that counts, and the disturbed ones that were retried."""
        record = self._replay(key, stamp)
        if record is not None:
            return record
        started = self.device.clock()
        samples = [measure()]
        while isinstance(last := samples[-1], Sample) and last.disturbed and len(samples) <= self._retries:
            pause = float(1 << (len(samples) - 1))
            if self.spent + self.device.clock() - started + pause > self.budget:
                break
            self.device.wait(pause)
            samples.append(measure())
        seconds = self.device.clock() - started
        values: dict[str, Any] = {}
        if isinstance(last, Failure):
            values["failure"] = [last.kind, last.detail]
        elif isinstance(last, Sample):
            values |= {"us": last.us, "clock": last.clock, "disturbed": last.disturbed}
            discarded = [r for r in samples[:-1] if isinstance(r, Sample)]
            values["retried"] = [[r.us, r.clock, r.disturbed] for r in discarded]
        return self._record(key, stamp, seconds, **values)

    def _replay(self, key: Key, stamp: str) -> dict[str, Any] | None:
        record = self.log.next(key, stamp)
        if record is not None:
            self._spend(record, "replayed")
        return record

    def _record(self, key: Key, stamp: str, seconds: float, **values: Any) -> dict[str, Any]:
        record = self.log.add(key, stamp, seconds=seconds, **values)
        self._spend(record, "measured")
        return record

    def _spend(self, record: dict[str, Any], how: str) -> None:
        self.spent += record["seconds"]
        self.counts[how] += 1
        self.counts[f"{record['what'].split()[0]}s"] += 1
        self.counts["retried"] += len(record.get("retried", ()))
        if "us" in record:
            disturbed = bool(record.get("disturbed"))
            self._retries = 1 if disturbed else RETRIES
            self.counts["still disturbed"] += disturbed
        self._progress(self.spent)

    def _check_record(self, item: Item, candidate: Candidate, record: dict[str, Any]) -> None:
        if "failure" in record:
            self._failed[item.key, candidate.key] = Failure(*record["failure"])
            self._raise_if_failed(item, candidate)

    def _raise_if_failed(self, item: Item, candidate: Candidate) -> None:
        failure = self._failed.get((item.key, candidate.key))
        if failure is not None:
            raise CandidateFailed(failure)

    def _stamp(self, *ops: str) -> str:
        """Hash of what measurements of these operators depend on, besides the item and the configuration."""
        if ops not in self._stamps:
            hashes = [hashes_of(REGISTRY[op]) for op in ops]
            facts = self.device.facts
            text = json.dumps([hashes, str(facts.gpu), facts.triton, facts.torch, facts.driver, facts.power_limit_w])
            self._stamps[ops] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._stamps[ops]
