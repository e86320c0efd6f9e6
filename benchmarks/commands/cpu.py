"""`python -m benchmarks cpu`: the compiled models against the public structure in eager PyTorch, on this CPU.

Both compute the same in float32 from the same random weights (the demo: its own), LoRA merged, at full width on one
128x128 image, in one process and in turns. Ours is the reference backend: channels_last, every constant folded.
Ends with 1 if outputs differ by more than 1e-4 of the image's range, or a speedup is below its bar.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure.results import Record, Results, Sink
from benchmarks.measure.timing import Stopwatch, Work, record
from benchmarks.subjects.families import SUBJECTS
from benchmarks.subjects.models import Model, image, model
from model.reference.pipelines import bicubic
from tinysr_kernels.nets import LatentNetwork

SUMMARY = "The compiled models against eager PyTorch on this CPU: speedups and equality of outputs."
EQUAL = 1e-4
SIDE = 128


@dataclass(frozen=True)
class Case:
    """A whole family, or (part) its VAE only; bar: the minimum speedup."""

    family: str
    variant: str
    bar: float
    part: str = "whole"

    @property
    def name(self) -> str:
        """Identifies the case."""
        return f"{self.family} {self.variant}, {self.part}"


CASES = tuple(
    Case(family, bar.variant, bar.least, bar.part) for family, subject in SUBJECTS.items() for bar in subject.bars
)
Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]


def pair(case: Case, made: Model, side: int) -> Pair:
    """(eager, ours), each from a float32 image in [0,1] to a float32 image in [0,1]."""
    reference, compiled = made.reference(), made.compiled(backend="reference", graphs=0)
    lr = image(side, side).float() / 255
    if case.part == "whole":
        return lambda: reference(lr), lambda: compiled.enlarge(lr)
    network, vae = compiled.network, reference.parts["vae"]
    assert isinstance(network, LatentNetwork)
    enlarged = bicubic(lr)

    def ours() -> Tensor:
        return network.decoder(network.encoder(enlarged))

    return lambda: vae.decode(vae.encode(enlarged * 2 - 1)) / 2 + 0.5, ours


@torch.inference_mode()
def measure(case: Case, made: Model, rounds: int, side: int = SIDE) -> list[Record]:
    """Three records: both times and the speedup."""
    eager, ours = pair(case, made, side)
    difference = float((eager() - ours()).abs().max())
    works = {"eager": Work(eager), "ours": Work(ours)}
    found = Stopwatch(torch.device("cpu")).interleaved(works, rounds)
    labels = {"family": case.family, "variant": case.variant, "part": case.part, "size": f"{side}x{side}"}
    records = [
        record(f"{case.name}: {name}", labels | {"what": name}, several, works[name]) for name, several in found.items()
    ]
    both = [[one.us for one in found[name][0]] for name in ("eager", "ours")]
    processor = [[one.cpu_us for one in found[name][0]] for name in ("eager", "ours")]
    values = {
        "speedup": statistics.median(a / b for a, b in zip(*both, strict=True)),
        "cpu_time_speedup": statistics.median(a / b for a, b in zip(*processor, strict=True)),
        "bar": case.bar,
        "difference": difference,
    }
    return [*records, Record(f"{case.name}: speedup", labels | {"what": "speedup"}, values=values)]


def faults(results: Results) -> Iterator[str]:
    """What failed."""
    for one in results.records:
        name, _, what = one.key.rpartition(": ")
        if what == "speedup" and not one.values["difference"] <= EQUAL:
            yield f"{name}: outputs differ by {one.values['difference']:.2g}, at most {EQUAL:g} is equal"
        if what == "speedup" and one.values["speedup"] < one.values["bar"]:
            yield f"{name}: {one.values['speedup']:.2f} times as fast as eager, expected {one.values['bar']:g}"


def table(results: Results) -> list[str]:
    """One line per case."""
    lines = [f"{'':<32} {'eager ms':>9} {'ours ms':>9} {'speedup':>8} {'CPU time':>8} {'bar':>5} {'difference':>10}"]
    for one in results.records:
        name, _, what = one.key.rpartition(": ")
        if what != "speedup":
            continue
        times = [found.values["p50_us"] / 1e3 for w in ("eager", "ours") if (found := results.find(f"{name}: {w}"))]
        value = one.values
        lines.append(
            f"{name:<32} {times[0]:>9.1f} {times[1]:>9.1f} {value['speedup']:>8.2f} {value['cpu_time_speedup']:>8.2f} "
            f"{value['bar']:>5.2f} {value['difference']:>10.1e}"
        )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="samples of each (default 5)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of PyTorch (default 1, as in the tests)")
    parser.add_argument("--only", metavar="TEXT", default="", help="cases whose names contain it")
    parser.add_argument("--size", type=int, default=SIDE, metavar="N", help=f"side of the image (default {SIDE})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there")


def main(options: argparse.Namespace) -> int:
    """Measure, print, report failures."""
    torch.set_num_threads(options.threads)
    sink = Sink("cpu", "CPU", options.size != SIDE, options.json)
    sink.results.environment["threads"] = str(options.threads)
    chosen = [case for case in CASES if options.only in case.name]
    made: Model | None = None
    for case in chosen:
        if made is None or (made.family, made.variant) != (case.family, case.variant):
            made = model(case.family, case.variant)
        sink.add(*measure(case, made, options.rounds, options.size))
        print(f"{case.name}: done", file=sys.stderr)
    sink.finish()
    for line in table(sink.results):
        print(line)
    wrong = list(faults(sink.results))
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0
