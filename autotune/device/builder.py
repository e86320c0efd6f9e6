"""Ahead-of-time compilation of candidates in worker processes; no GPU is needed.

Resource usage is cached in a file by a hash of source and arguments, so nothing is compiled twice. The results of
`python -m benchmarks static --keep` serve as cache entries too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.device.worker import Worker, run_all
from autotune.items.results import Failure

if TYPE_CHECKING:  # worker processes import torch after they have started
    from autotune.items.candidates import Candidate
    from autotune.items.cost_model import Built
    from benchmarks.static.machine_code import Variant
    from tinysr_kernels.launch.device import Gpu

COMPILE_SECONDS = 120.0
CACHE = Path("build/autotune/compiled.jsonl")
COMPILE_ERROR = "does not compile"
Usage = tuple[int, int, int] | str
"""Registers per thread, bytes of shared memory and bytes spilled per thread; or why compilation failed."""


class Compiler:
    """Compiles in a worker process."""

    def __init__(self) -> None:
        os.environ["TRITON_INTERPRET"] = "0"

    def build(self, variant: Variant) -> Usage:
        """Compile one launch and return its resource usage."""
        from benchmarks.static.machine_code import resource_usage

        return resource_usage(variant) or COMPILE_ERROR


class Builder:
    """Compiles each distinct variant once, in several worker processes.

    cache: the file of earlier results, None for no cache. compiled: how many variants missed the cache.
    """

    def __init__(self, gpu: Gpu, workers: int, cache: Path | None = None) -> None:
        self.gpu = gpu
        self.workers = [Worker("autotune.device.builder:Compiler") for _ in range(workers)]
        self.cache = cache
        self.known: dict[str, Usage] = {} if cache is None else read_cache(cache)
        self.compiled = 0

    def build(self, candidates: Sequence[Candidate], on_compiled: Callable[[], None] = lambda: None) -> list[Built]:
        """Resource usage and faults of each candidate. on_compiled: called after each compilation."""
        plans = [self.variants(c) for c in candidates]
        uncached = self.uncached(candidates)

        def done(index: int, result: Any) -> None:
            digest, usage = uncached[index].digest, _usage(result)
            self.known[digest] = usage
            self.compiled += 1
            # A crash or a hang may be due to the machine, so it is not cached.
            if self.cache is not None and not isinstance(result, Failure):
                append_cache(self.cache, digest, usage)
            on_compiled()

        run_all(self.workers, "build", [(v,) for v in uncached], COMPILE_SECONDS, done)
        return [self._built([self.known[v.digest] for v in variants]) for variants in plans]

    def variants(self, candidate: Candidate) -> list[Variant]:
        """The compilations of a candidate, one per launch."""
        from benchmarks.static.machine_code import variant
        from tinysr_kernels.launch.plan import Launch

        return [variant(self.gpu.arch, x) for x in candidate.plan.launches if isinstance(x, Launch)]

    def uncached(self, candidates: Iterable[Candidate]) -> list[Variant]:
        """The distinct compilations of the candidates that are not in the cache."""
        found = {v.digest: v for c in candidates for v in self.variants(c)}
        return [v for digest, v in found.items() if digest not in self.known]

    def stop(self) -> None:
        """Kill the worker processes."""
        for worker in self.workers:
            worker.stop()

    def _built(self, usages: Sequence[Usage]) -> Built:
        from autotune.items.cost_model import Built

        faults = [u for u in usages if isinstance(u, str)]
        clean = [u for u in usages if not isinstance(u, str)]
        faults += ["spills registers" for _, _, spilled in clean if spilled]
        faults += ["needs too much shared memory" for _, shared, _ in clean if shared > self.gpu.shared_limit]
        resources = tuple((registers, shared) for registers, shared, _ in clean)
        return Built(resources if not faults else (), tuple(dict.fromkeys(faults)))


def _usage(result: Any) -> Usage:
    if isinstance(result, Failure):
        return {"crash": "crashes the compiler", "timeout": "hangs the compiler"}.get(result.kind, COMPILE_ERROR)
    return result


def read_cache(cache: Path) -> dict[str, Usage]:
    """Results of earlier compilations with this version of Triton, by the variant's hash."""
    from autotune.items.log import read_records
    from benchmarks.static import static

    version = _triton()
    reports = static.read_reports(static.RESULTS / f"static-triton-{version}.json").values()
    found: dict[str, Usage] = {
        one.digest: COMPILE_ERROR
        if one.registers is None or one.shared_bytes is None or one.spill_bytes is None
        else (one.registers, one.shared_bytes, one.spill_bytes)
        for one in reports
    }
    for record in read_records(cache) if cache.exists() else ():
        code = record.get("code")
        if record["stamp"] == version and _is_usage(code):
            found[record["subject"]] = tuple(code) if isinstance(code, list) else COMPILE_ERROR
    return found


def _is_usage(code: object) -> bool:
    """Whether a record of the cache says what a `Usage` says; otherwise the variant is compiled again."""
    if isinstance(code, list):
        return len(code) == 3 and all(type(value) is int and value >= 0 for value in code)
    return isinstance(code, str)


def append_cache(cache: Path, digest: str, usage: Usage) -> None:
    """Append one result; several processes may append concurrently."""
    from autotune.items.log import append

    append(cache, {"what": "compiled", "subject": digest, "config": "", "stamp": _triton(), "code": usage})


def _triton() -> str:
    from tinysr_kernels.versions import installed

    return installed("triton")
