"""`python -m benchmarks ceilings`: measured upper limits of this device, the reference for all other results.

Copy bandwidth (bytes read and written, larger than all caches), GEMM rate in each dtype, the host's time per kernel
launch, and the device's time per dependent node of a CUDA graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.hardware import Ceilings, ceilings
from benchmarks.measure.results import Results
from benchmarks.measure.session import Session, add_arguments, session
from benchmarks.measure.timing import Work, graphed, record, sequential
from tinysr_kernels.launch.device import gpu_at

SUMMARY = "Copy bandwidth, GEMM rate of each dtype, time per launch and per graph node."
SAMPLES = 20
NODES = 512
__all__ = ["SUMMARY", "add_arguments", "main", "measure", "physical"]


def physical(made: Session) -> Ceilings | None:
    """Peaks of the GPU from its SMs, clocks and DRAM; None for a CPU."""
    if not made.cuda:
        return None
    limits: dict[str, Any] = getattr(made.stopwatch.watch, "limits", dict)()
    return ceilings(gpu_at(made.device), limits.get("clock"), limits.get("memory"))


def _products(made: Session) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Any], torch.dtype, bool]]:
    """(name, GEMM, dtype of its operands, whether the tensor-core peak bounds it)."""
    yield "float32", torch.mm, torch.float32, False
    yield "bfloat16", torch.mm, torch.bfloat16, True
    if not made.cuda:
        return
    yield "float16", torch.mm, torch.float16, True
    yield "tf32", torch.mm, torch.float32, True
    if torch.cuda.get_device_capability(made.device) >= (8, 9):
        one = torch.ones((), device=made.device)

        def scaled(a: Tensor, b: Tensor) -> Tensor:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

        yield "float8_e4m3", scaled, torch.float8_e4m3fn, True


def _matrix(made: Session, name: str, product: Callable[[Tensor, Tensor], Any], dtype: torch.dtype, half: bool) -> None:
    side = 8192 if made.cuda else 1024
    limits = physical(made)
    flops = 2 * side**3
    floor = 0.0
    if limits is not None:
        peak = limits.rate(8 * dtype.itemsize if name != "tf32" else 16) if half else limits.fp32
        floor = 1e6 * flops / peak
    pairs = [[torch.randn(side, side, device=made.device).to(dtype) for _ in range(2)] for _ in range(2)]
    kept = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    try:
        runs = [lambda a=a, b=b: product(a, b) for a, b in pairs]
        work = graphed(runs, 2, floor, pairs) if made.cuda else sequential(runs, keep=pairs)
        (found,) = made.stopwatch.interleaved({name: work}, SAMPLES, made.until).values()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = kept
    labels = {"what": "GEMM", "dtype": name, "size": f"{side}x{side}x{side}"}
    one = record(f"matrix {name}", labels, found, work)
    one.values["tflops"] = flops / one.values["p50_us"] / 1e6
    made.sink.add(one)


def _copy(made: Session) -> None:
    numbers = (1 << 28) if made.cuda else (1 << 24)
    source, target = (torch.rand(numbers, device=made.device) for _ in range(2))
    limits = physical(made)
    moved = 2 * source.nbytes
    work = Work(lambda: target.copy_(source), floor_us=1e6 * moved / limits.memory if limits else 0.0)
    (found,) = made.stopwatch.interleaved({"copy": work}, SAMPLES, made.until).values()
    one = record("copy", {"what": "copy", "size": f"{source.nbytes >> 20} MiB"}, found, work)
    one.values["gbs"] = moved / one.values["p50_us"] / 1e3
    made.sink.add(one)


def _launches(made: Session) -> None:
    """The host's time per launch, and (on a GPU) the device's time per node of a graph."""
    t = torch.zeros(1, device=made.device)

    def launch() -> None:
        t.add_(1)

    work = sequential([launch] * NODES)
    work.host = True
    (found,) = made.stopwatch.interleaved({"launch": work}, SAMPLES, made.until).values()
    made.sink.add(record("launch", {"what": "launch", "size": f"{NODES} in a row"}, found, work))
    if made.cuda:
        work = graphed([launch], NODES)
        (found,) = made.stopwatch.interleaved({"node": work}, SAMPLES, made.until).values()
        made.sink.add(record("graph node", {"what": "graph node", "size": f"{NODES} in a row"}, found, work))


@torch.inference_mode()
def measure(made: Session) -> None:
    """All of them."""
    if not made.sink.has("copy"):
        with made.guarded("copy", {"what": "copy"}):
            _copy(made)
    for name, product, dtype, half in _products(made):
        if not made.sink.has(f"matrix {name}"):
            with made.guarded(f"matrix {name}", {"what": "GEMM", "dtype": name}):
                _matrix(made, name, product, dtype, half)
    if not made.sink.has("launch"):
        with made.guarded("launch", {"what": "launch"}):
            _launches(made)


def table(results: Results) -> list[str]:
    """One line per ceiling."""
    units = {"tflops": "TFLOP/s", "gbs": "GB/s"}
    lines = []
    for one in results.records:
        if one.error:
            lines.append(f"{one.key:<20} {one.error}")
            continue
        rate = " ".join(f"{one.values[k]:.1f} {unit}" for k, unit in units.items() if k in one.values)
        lines.append(f"{one.key:<20} {one.values['p50_us']:>12.2f} us  {rate}")
    return lines


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    with session("ceilings", options) as made:
        measure(made)
    for line in table(made.sink.results):
        print(line)
    return 0
