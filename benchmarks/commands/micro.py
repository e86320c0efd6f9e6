"""`python -m benchmarks micro`: each operation at the networks' real shapes, compared with other implementations.

The calls are those of the released networks for one 128x128 image, each once (`network_calls.py`). Peers: eager
PyTorch in the same dtype, torch.compile, and library kernels if the operation has them as a configuration. On a GPU all
are CUDA graph replays on rotating inputs, without launch overhead and with a cold L2. Without a GPU: the cheapest calls
of each operation, with its reference.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.commands.ceilings import physical
from benchmarks.measure.results import Results
from benchmarks.measure.session import Session, session
from benchmarks.measure.session import add_arguments as add_common
from benchmarks.measure.timing import Work, graphed, record, rotation, sequential
from benchmarks.static.network_calls import main_calls
from benchmarks.subjects.eager import eager, has_eager, in_own_dtype
from tinysr_kernels.first_use.inputs import random_call
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import gpu_at
from tinysr_kernels.launch.plan import Library
from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.ops.call import Cost

SUMMARY = "Each operation at the networks' real shapes against PyTorch eager, torch.compile and the libraries."
SAMPLES = 20
PEERS = ("ours", "eager", "compile", "library")
COMPILE_SECONDS = 4.0
ON_CPU = 2
"""Number of calls per operation on a CPU: the cheapest ones."""
Run = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One call of an operation, on meta tensors."""

    dtype: str
    call: Operator

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.call.name

    @property
    def cost(self) -> Cost:
        """FLOPs and least bytes."""
        return self.call.cost()

    @property
    def key(self) -> str:
        """Identifies the call."""
        return f"{self.op} {self.dtype} {self.shapes}"

    def labels(self, peer: str) -> dict[str, str]:
        """The labels of its records."""
        return {"op": self.op, "dtype": self.dtype, "shapes": self.shapes, "peer": peer}

    @property
    def shapes(self) -> str:
        """The tensors' shapes and what else tells calls apart."""

        def of(value: Any) -> str:
            return "x".join(map(str, value.shape)) if isinstance(value, Tensor) else str(value)

        return " ".join(f"{name}={of(v)}" for name, v in self.call.arguments.items() if v is not None)


def cases(cpu: bool) -> list[Case]:
    """All calls, those that must take longest first; on a CPU the cheapest of each operation, in float32."""
    found = []
    for op in REGISTRY:
        several = [Case(dtype, call) for dtype, call in main_calls(op, "float32" if cpu else None)]
        several.sort(key=lambda case: (case.cost.bytes, case.cost.flops))
        found += several[:ON_CPU] if cpu else several
    return found if cpu else sorted(found, key=lambda case: (-case.cost.bytes, -case.cost.flops))


def runs(peer: str, calls: list[Operator]) -> list[Run] | None:
    """The same call on several sets of inputs, as the peer computes each; None where it does not."""
    on_cpu = calls[0].first.device.type == "cpu"
    if peer == "ours":
        if on_cpu:
            return [call.reference for call in calls]
        # Results are allocated beforehand, so that each set of inputs has its own, as cold as they are.
        return [call.planned()[0].run for call in calls]
    if peer == "library":
        if on_cpu:
            return None
        for config in calls[0].space(gpu_at(calls[0].first.device)):
            if any(isinstance(launch, Library) for launch in calls[0].plan(config).launches):
                return [call.plan(config).run for call in calls]
        return None
    if not has_eager(calls[0].name):
        return None
    functions, own = zip(*(eager(call) for call in calls), strict=True)
    function = torch.compile(functions[0], dynamic=False) if peer == "compile" else functions[0]
    return [functools.partial(function, **one) for one in own]


def measure_call(made: Session, case: Case, peers: tuple[str, ...]) -> None:
    """One record per peer; their samples are interleaved."""
    limits = physical(made)
    cost = case.cost
    l2 = torch.cuda.get_device_properties(made.device).L2_cache_size if made.cuda else 0
    sets = rotation(cost.bytes, l2) if made.cuda else 2
    inputs = [random_call(case.call, made.device, seed) for seed in range(sets)]
    rotated = len(inputs) * cost.bytes >= 2 * l2
    # The 16-bit rate bounds float32 too: libraries may use TF32, which is slower than 16 bits and faster than float32.
    floor = 1e6 * limits.floor(cost, 8 if "fp8" in case.op else 16) if limits and rotated else 0.0
    works: dict[str, Work] = {}
    for peer in peers:
        own = in_own_dtype() if peer in ("eager", "compile") else using("auto")
        with made.guarded(f"{case.key}: {peer}", case.labels(peer)), own:
            if peer == "compile":
                made.need(COMPILE_SECONDS)
            found = runs(peer, inputs)
            if found is not None:
                works[peer] = graphed(found, floor_us=floor) if made.cuda else sequential(found)
    # Graphs are captured by now, so backend and dtype settings no longer matter. On a CPU everything is float32.
    measured = made.stopwatch.interleaved(works, SAMPLES if made.cuda else 5, made.until)
    for peer, several in measured.items():
        values = {"flops": float(cost.flops), "bytes": float(cost.bytes)}
        one = record(f"{case.key}: {peer}", case.labels(peer), several, works[peer], **values)
        one.values["tflops"] = cost.flops / one.values["p50_us"] / 1e6
        one.values["gbs"] = cost.bytes / one.values["p50_us"] / 1e3
        made.sink.add(one)


@torch.inference_mode()
def measure(made: Session, peers: tuple[str, ...] = PEERS, ops: tuple[str, ...] = ()) -> None:
    """All cases, or those of some operations, while there is time; existing records are not measured again."""
    chosen = [case for case in cases(not made.cuda) if not ops or case.op in ops]
    for i, case in enumerate(chosen):
        if made.sink.has(f"{case.key}: ours"):
            continue
        if made.left() <= 0:
            made.cut = True
            made.sink.note(f"no time left for {len(chosen) - i} of {len(chosen)} calls, the cheapest")
            break
        with made.guarded(f"{case.key}: ours", case.labels("ours")):
            measure_call(made, case, peers)
        made.release()


def table(results: Results) -> list[str]:
    """One line per call: what each peer takes, and what ours comes to."""
    groups: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
    for one in results.records:
        key = tuple(one.labels[name] for name in ("op", "dtype", "shapes"))
        groups.setdefault(key, {})[one.labels["peer"]] = {} if one.error else one.values
    lines = [
        f"{'operation':<24} {'dtype':<9} " + " ".join(f"{p + ' us':>11}" for p in PEERS) + "  of floor   GB/s TFLOP/s"
    ]
    for (op, dtype, shapes), peers in groups.items():
        times = " ".join(f"{peers[p]['p50_us']:>11.2f}" if peers.get(p) else f"{'-':>11}" for p in PEERS)
        ours = peers.get("ours") or {}
        share = f"{ours['of_floor']:>8.0%}" if "of_floor" in ours else f"{'-':>8}"
        rates = f"{ours.get('gbs', 0):>8.0f} {ours.get('tflops', 0):>7.2f}"
        lines.append(f"{op:<24} {dtype:<9} {times}  {share} {rates}  {shapes[:110]}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_common(parser)
    parser.add_argument("--op", action="append", choices=sorted(REGISTRY), help="this one alone (repeatable)")
    parser.add_argument("--peer", action="append", choices=PEERS, help="this one alone (repeatable; all)")


def main(options: argparse.Namespace) -> int:
    """Measure and print. torch.compile needs a C++ compiler on a CPU, and is left out there unless asked for."""
    with session("micro", options) as made:
        peers = tuple(options.peer or (p for p in PEERS if made.cuda or p != "compile"))
        measure(made, peers, tuple(options.op or ()))
    for line in table(made.sink.results):
        print(line)
    return 0
