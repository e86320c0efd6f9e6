"""A real GPU as a device under tuning: one worker process runs kernels on it, others compile for it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from autotune.device.builder import CACHE, Builder
from autotune.device.worker import Worker
from autotune.items.candidates import Candidate
from autotune.items.cost_model import Built
from autotune.items.device import Entries
from autotune.items.results import Failure, Sample
from autotune.items.work import Item, Target
from benchmarks.hardware import Ceilings, ceilings
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch.config_file import Facts
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.versions import installed

CHECK_SECONDS = 120.0
"""For compiling a candidate, running it, and the float64 reference on GPUs with slow float64."""
SAMPLE_SECONDS = 60.0
MODEL_SECONDS = 600.0


class CudaDevice:
    """CUDA device `index`. workers: parallel compilations. busy: GPU utilization by other processes, in percent."""

    def __init__(self, index: int, workers: int) -> None:
        self.worker = Worker("autotune.device.cuda:GpuRunner", index)
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
        self.builder = Builder(gpu, workers, CACHE)

    def build(self, item: Item, candidates: Sequence[Candidate]) -> list[Built]:
        """Compile ahead of time, several candidates in parallel."""
        return self.builder.build(candidates)

    def check(self, item: Item, candidate: Candidate, draw: int) -> Failure | None:
        """Run on random inputs and compare with the reference; None if the outputs are correct."""
        return self.worker.call("check", item, candidate.config, draw, seconds=CHECK_SECONDS)

    def sample(self, item: Item, candidate: Candidate) -> Sample | Failure:
        """Take one timing sample."""
        floor_us = 1e6 * self.ceilings.floor(item.cost, item.bits)
        return self.worker.call("sample", item, candidate.config, floor_us, seconds=SAMPLE_SECONDS)

    def sample_model(self, target: Target, entries: Entries, pdl: bool) -> Sample | Failure:
        """Take one timing sample of a whole model, with these configurations as overrides.

        pdl: whether with programmatic dependent launches.
        """
        overrides: dict[str, Any] = {op: dict(some) for op, some in entries.items()}
        return self.worker.call("sample_model", target, overrides, pdl, seconds=MODEL_SECONDS)

    def clock(self) -> float:
        """Seconds since an arbitrary start."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)

    def stop(self) -> None:
        """Kill all worker processes."""
        self.worker.stop()
        self.builder.stop()
