"""Ahead-of-time compilation of candidates in worker processes; no GPU is needed.

What was compiled from the very same source before is not compiled again: answers are kept in a file, and those that
`python -m benchmarks static` keeps count too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.device.worker import Worker, run_all
from autotune.items.answers import Failure

if TYPE_CHECKING:  # the workers import torch when they have begun
    from autotune.items.candidates import Candidate
    from autotune.items.cost_model import Built
    from benchmarks.static.machine_code import Variant
    from tinysr_kernels.launch.device import Gpu

COMPILE_SECONDS = 120.0
KEPT = Path("build/autotune/compiled.jsonl")
NO_CODE = "does not compile"
Code = tuple[int, int, int] | str
"""Registers a thread, bytes of shared memory and bytes spilled, or why there is no code."""


class Compiler:
    """Lives in a worker's process."""

    def __init__(self) -> None:
        os.environ["TRITON_INTERPRET"] = "0"

    def build(self, variant: Variant) -> Code:
        """Compile one launch."""
        from benchmarks.static.machine_code import needs

        return needs(variant) or NO_CODE


class Builder:
    """Compiles in several processes, each distinct variant once.

    kept: the file of earlier answers, None for none. compiled: how many were compiled here, not recalled.
    """

    def __init__(self, gpu: Gpu, workers: int, kept: Path | None = None) -> None:
        self.gpu = gpu
        self.workers = [Worker("autotune.device.builder:Compiler") for _ in range(workers)]
        self.kept = kept
        self.known: dict[str, Code] = {} if kept is None else recall(kept)
        self.compiled = 0

    def build(self, candidates: Sequence[Candidate], say: Callable[[], None] = lambda: None) -> list[Built]:
        """For each candidate what its launches need, and what must not be. say: called after each compilation."""
        plans = [self.variants(c) for c in candidates]
        missing = self.missing(candidates)

        def done(place: int, answer: Any) -> None:
            digest, code = missing[place].digest, _code(answer)
            self.known[digest] = code
            self.compiled += 1
            # A crash or a hang may be the machine's fault: it is tried again another time.
            if self.kept is not None and not isinstance(answer, Failure):
                keep(self.kept, digest, code)
            say()

        run_all(self.workers, "build", [(v,) for v in missing], COMPILE_SECONDS, done)
        return [self._built([self.known[v.digest] for v in variants]) for variants in plans]

    def variants(self, candidate: Candidate) -> list[Variant]:
        """What is compiled for a candidate, a launch at a time."""
        from benchmarks.static.machine_code import variant
        from tinysr_kernels.launch.plan import Launch

        return [variant(self.gpu.arch, x) for x in candidate.plan.launches if isinstance(x, Launch)]

    def missing(self, candidates: Iterable[Candidate]) -> list[Variant]:
        """The distinct compilations that the candidates need and that nobody has made yet."""
        found = {v.digest: v for c in candidates for v in self.variants(c)}
        return [v for digest, v in found.items() if digest not in self.known]

    def stop(self) -> None:
        """End the processes."""
        for worker in self.workers:
            worker.stop()

    def _built(self, codes: Sequence[Code]) -> Built:
        from autotune.items.cost_model import Built

        faults = [c for c in codes if isinstance(c, str)]
        clean = [c for c in codes if not isinstance(c, str)]
        faults += ["spills registers" for _, _, spilled in clean if spilled]
        faults += ["needs too much shared memory" for _, shared, _ in clean if shared > self.gpu.shared_limit]
        resources = tuple((registers, shared) for registers, shared, _ in clean)
        return Built(resources if not faults else (), tuple(dict.fromkeys(faults)))


def _code(answer: Any) -> Code:
    if isinstance(answer, Failure):
        return {"crash": "crashes the compiler", "timeout": "hangs the compiler"}.get(answer.kind, NO_CODE)
    return answer


def recall(kept: Path) -> dict[str, Code]:
    """Answers of earlier compilations by this version of Triton, by what was compiled."""
    from autotune.items.log import read_records
    from benchmarks.static import static

    version = _triton()
    reports = static.known(static.RESULTS / f"static-triton-{version}.json").values()
    found: dict[str, Code] = {
        one.digest: NO_CODE
        if one.registers is None or one.shared_bytes is None or one.spill_bytes is None
        else (one.registers, one.shared_bytes, one.spill_bytes)
        for one in reports
    }
    for record in read_records(kept) if kept.exists() else ():
        if record["stamp"] == version:
            code = record.get("code")
            found[record["subject"]] = tuple(code) if isinstance(code, list) else NO_CODE
    return found


def keep(kept: Path, digest: str, code: Code) -> None:
    """Append one answer; several processes may do so at once."""
    from autotune.items.log import append

    append(kept, {"what": "compiled", "subject": digest, "config": "", "stamp": _triton(), "code": code})


def _triton() -> str:
    from tinysr_kernels.launch.config_file import installed

    return installed("triton")
