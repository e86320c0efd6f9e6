"""Ahead-of-time compilation of candidates in worker processes; no GPU is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from autotune.answers import Failure
from autotune.worker import Worker, run_all

if TYPE_CHECKING:  # the workers import torch when they have begun
    from autotune.candidates import Candidate
    from autotune.model import Built
    from benchmarks.machine_code import Variant
    from tinysr_kernels.launch.device import Gpu

COMPILE_SECONDS = 120.0
Code = tuple[int, int, int] | str
"""Registers a thread, bytes of shared memory and bytes spilled, or why there is no code."""


class Compiler:
    """Lives in a worker's process."""

    def __init__(self) -> None:
        os.environ["TRITON_INTERPRET"] = "0"

    def build(self, variant: Variant) -> Code:
        """Compile one launch."""
        from benchmarks.machine_code import compile_variant

        code = compile_variant(variant).code
        return "does not compile" if code is None else (code.registers, code.shared_bytes, code.spill_bytes)


class Builder:
    """Compiles in several processes and remembers what each compilation gave."""

    def __init__(self, gpu: Gpu, workers: int) -> None:
        self.gpu = gpu
        self.workers = [Worker("autotune.builder:Compiler") for _ in range(workers)]
        self.known: dict[Variant, Code] = {}

    def build(self, candidates: Sequence[Candidate]) -> list[Built]:
        """For each candidate what its launches need, and what must not be."""
        from benchmarks.machine_code import variant
        from tinysr_kernels.launch.plan import Launch

        plans = [[variant(self.gpu.arch, x) for x in c.plan.launches if isinstance(x, Launch)] for c in candidates]
        missing = list({v: None for variants in plans for v in variants if v not in self.known})
        found = run_all(self.workers, "build", [(v,) for v in missing], COMPILE_SECONDS)
        self.known |= {v: _code(answer) for v, answer in zip(missing, found, strict=True)}
        return [self._built([self.known[v] for v in variants]) for variants in plans]

    def stop(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.stop()

    def _built(self, codes: Sequence[Code]) -> Built:
        from autotune.model import Built

        faults = [c for c in codes if isinstance(c, str)]
        clean = [c for c in codes if not isinstance(c, str)]
        faults += ["spills registers" for _, _, spilled in clean if spilled]
        faults += ["needs too much shared memory" for _, shared, _ in clean if shared > self.gpu.shared_limit]
        resources = tuple((registers, shared) for registers, shared, _ in clean)
        return Built(resources if not faults else (), tuple(dict.fromkeys(faults)))


def _code(answer: Any) -> Code:
    if isinstance(answer, Failure):
        return {"crash": "crashes the compiler", "timeout": "hangs the compiler"}.get(answer.kind, "does not compile")
    return answer
