"""A real GPU for the search: a worker process for what runs on it, others for what is compiled for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from autotune.device.builder import KEPT, Builder
from autotune.device.worker import Worker
from autotune.items.answers import Failure, Sample
from autotune.items.candidates import Candidate
from autotune.items.cost_model import Built
from autotune.items.device import Entries
from autotune.items.work import Item, Target
from benchmarks.hardware import Ceilings, ceilings
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch.config_file import Facts, installed
from tinysr_kernels.launch.device import Gpu

CHECK_SECONDS = 120.0
"""For compiling a candidate, running it, and the float64 reference on cards that are slow at that."""
SAMPLE_SECONDS = 60.0
WHOLE_SECONDS = 600.0


class RealDevice:
    """CUDA device `index`. workers: compilations at a time; busy: percent of its time that others took at the start."""

    def __init__(self, index: int, workers: int) -> None:
        self.worker = Worker("autotune.device.cuda:Bench", index)
        found = self.worker.call("facts", seconds=60)
        if isinstance(found, Failure):
            raise InputError(f"CUDA device {index} cannot be used: {found.detail}")
        gpu = Gpu(found["name"], tuple(found["capability"]), found["multiprocessors"])
        self.facts = Facts(
            gpu,
            installed("triton"),
            installed("torch"),
            found["driver"],
            found["memory_mib"],
            found["power_limit_w"],
        )
        self.ceilings: Ceilings = ceilings(gpu, found["clock"], found["memory"])
        self.busy: int = found["busy"]
        self.builder = Builder(gpu, workers, KEPT)

    def build(self, item: Item, candidates: Sequence[Candidate]) -> list[Built]:
        """Compile ahead of time, many at once."""
        return self.builder.build(candidates)

    def check(self, item: Item, candidate: Candidate, draw: int) -> Failure | None:
        """Run on random inputs and compare with the reference; None if it is right."""
        return self.worker.call("check", item, candidate.config, draw, seconds=CHECK_SECONDS)

    def sample(self, item: Item, candidate: Candidate) -> Sample | Failure:
        """Time it once."""
        floor_us = 1e6 * self.ceilings.floor(item.cost, item.bits)
        return self.worker.call("sample", item, candidate.config, floor_us, seconds=SAMPLE_SECONDS)

    def whole(self, target: Target, entries: Entries, pdl: bool) -> Sample | Failure:
        """Time a whole model once, with these configurations in place of what is looked up.

        pdl: whether by programmatic dependent launches.
        """
        given: dict[str, Any] = {op: dict(some) for op, some in entries.items()}
        return self.worker.call("whole", target, given, pdl, seconds=WHOLE_SECONDS)

    def clock(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        time.sleep(seconds)

    def stop(self) -> None:
        """End all processes."""
        self.worker.stop()
        self.builder.stop()
