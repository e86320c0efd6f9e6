"""`python -m benchmarks correctness`: whether the kernels compute correct results on this GPU.

Every distinct launch of every network is held to the references as at a first `compile` (`tinysr_kernels/first_use/`):
in children that may crash or hang, several at once, as most of the time goes into compilation. The released networks in
their own dtypes come first, float32 last. Then compute-sanitizer runs over one call of each operation if it is
installed. Without a GPU: a few small launches in the interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure.results import Record, Results
from benchmarks.measure.session import Session, add_arguments, session
from benchmarks.static.plan import calls
from benchmarks.subjects.families import DEMO
from benchmarks.subjects.networks import DTYPES, OWN_DTYPE, VARIANTS, network
from tinysr_kernels.first_use import supervise
from tinysr_kernels.first_use.items import Item, items_of
from tinysr_kernels.first_use.supervise import Bounds
from tinysr_kernels.first_use.verdicts import PASSED, UNCHECKED, Verdict
from tinysr_kernels.launch.device import Gpu, gpu_at
from tinysr_kernels.ops import Operator

SUMMARY = "Every network's kernels against the references on this GPU, and the compute sanitizer if it is there."
ROOT = Path(__file__).parents[2]
SIZE, SMALL_SIZE = (128, 128), (8, 8)
SMALL_FLOPS = 1 << 16
"""FLOPs of the largest launch that is checked in the interpreter."""
CHILDREN = 8
"""At once, at most: each has a CUDA context."""
STARTS = 20
"""Children that may die in the place of each."""
SHOWN = 3
"""Failures that a record names."""
SANITIZER_SECONDS = 60.0
ONE_CALL = """
import torch
from benchmarks.static.network_calls import main_calls
from tinysr_kernels.first_use.inputs import random_call
from tinysr_kernels.ops import REGISTRY
device = torch.device("cuda", torch.cuda.current_device())
for name in REGISTRY:
    calls = sorted((call for _, call in main_calls(name, "float16")), key=lambda call: call.cost().bytes)
    if calls:
        random_call(calls[0], device, 0).planned()[0].run()
torch.cuda.synchronize()
"""
__all__ = ["SUMMARY", "add_arguments", "main", "measure"]


class Subject(NamedTuple):
    """A network whose launches are checked."""

    family: str
    variant: str
    dtype: str

    @property
    def key(self) -> str:
        """Identifies its record."""
        return f"kernels {self.family} {self.variant} {self.dtype}"


def subjects() -> list[list[Subject]]:
    """All networks, in groups of falling importance: as released, in both half dtypes, in float32."""
    own = [Subject(family, known[0], OWN_DTYPE[family]) for family, known in VARIANTS.items()]
    every = [(family, variant) for family, known in VARIANTS.items() for variant in known]
    halves = [Subject(*one, dtype) for dtype in ("float16", "bfloat16") for one in every]
    wide = [Subject(family, known[0], "float32") for family, known in VARIANTS.items()]
    return [own, [one for one in halves if one not in own], wide]


def operators(one: Subject, size: tuple[int, int] = SIZE, batch: int = 1) -> list[Operator]:
    """The operator calls of a network for uint8 images of this height and width, on meta tensors."""
    model = network(one.family, one.variant, DTYPES[one.dtype])
    found = calls(model, *size, batch, plan_launches=False)
    return [call.operator for call in found if call.operator is not None]


def small_items(gpu: Gpu) -> list[Item]:
    """The cheapest launch of each operator of the demo, of those that the interpreter runs in a moment."""
    cheapest: dict[str, Operator] = {}
    for call in sorted(operators(Subject(*DEMO, "float16"), SMALL_SIZE), key=lambda c: c.cost().flops):
        if call.cost().flops <= SMALL_FLOPS:
            cheapest.setdefault(call.name, call)
    return items_of(cheapest.values(), gpu)


def check(items: Sequence[Item], made: Session) -> tuple[dict[str, Verdict], str]:
    """The verdicts on the items, by key, and why there may be too few of them."""
    if not items:
        return {}, ""
    count = min(max(len(os.sched_getaffinity(0)) // 2, 1), CHILDREN, len(items)) if made.cuda else 1
    left = min(1000000.0, made.left())
    bounds = Bounds(total=left, children=STARTS)
    with ThreadPoolExecutor(count) as pool:
        parts = [items[i::count] for i in range(count)]
        outcomes = list(pool.map(lambda part: supervise.run(part, made.device, bounds), parts))
    verdicts = {key: one for outcome in outcomes for key, one in outcome.verdicts.items()}
    return verdicts, next((o.general or o.obstacle for o in outcomes if o.general or o.obstacle), "")


def _kernels(made: Session, group: Mapping[str, list[Item]], known: dict[str, Verdict]) -> None:
    """Check the items of several networks at once, and add a record for each."""
    distinct = {item.key: item for items in group.values() for item in items if item.key not in known}
    found, obstacle = check(list(distinct.values()), made)
    known |= found
    for key, items in group.items():
        verdicts = [known.get(item.key) for item in items]
        counts = Counter(UNCHECKED if one is None else one.kind for one in verdicts)
        failures = [str(one) for one in verdicts if one is not None and one.kind not in (PASSED, UNCHECKED)]
        error = "; ".join(failures[:SHOWN])
        if counts[UNCHECKED] and not error:
            error = f"{counts[UNCHECKED]} launches unchecked: {obstacle or 'no reference'}"
        made.cut = made.cut or counts[UNCHECKED] > 0
        values = {"launches": float(len(items)), **{kind: float(n) for kind, n in counts.items()}}
        made.sink.add(Record(key, {"what": "kernels", "group": key}, values=values, error=error))


def _sanitizer(made: Session) -> None:
    labels = {"what": "compute sanitizer"}
    tool = shutil.which("compute-sanitizer")
    if tool is None or not made.cuda:
        made.sink.note("compute-sanitizer is not installed here, or there is no GPU: not run")
        return
    with made.guarded("compute sanitizer", labels):
        made.need(10)
        command = [tool, "--error-exitcode", "9", sys.executable, "-c", ONE_CALL]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
        seconds = max(min(made.left(), SANITIZER_SECONDS), 1.0)
        done = subprocess.run(  # a faulty kernel can break its CUDA context
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        error = "" if done.returncode == 0 else _last_line(done.stdout + done.stderr)
        values = {"exit": float(done.returncode)}
        made.sink.add(Record("compute sanitizer", labels, values=values, error=error))


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if re.match(r"(=+ ERROR SUMMARY)", line)]
    return (lines or text.strip().splitlines() or ["no output"])[-1][:300]


def measure(made: Session) -> None:
    """All networks while there is time; those that passed before are skipped."""
    gpu, known = gpu_at(made.device), dict[str, Verdict]()
    groups = subjects() if made.cuda else []
    if not made.cuda and not made.sink.has("kernels small"):
        with made.guarded("kernels small", {"what": "kernels"}):
            _kernels(made, {"kernels small": small_items(gpu)}, known)
    for group in groups:
        waiting = [one for one in group if not made.sink.has(one.key)]
        with made.guarded("kernels", {"what": "kernels"}):
            made.need(10)
            _kernels(made, {one.key: items_of(operators(one), gpu) for one in waiting}, known)
    if not made.sink.has("compute sanitizer"):
        _sanitizer(made)


def table(results: Results) -> list[str]:
    """One line per network."""
    return [
        f"{one.key:<36} {', '.join(f'{n:.0f} {what}' for what, n in one.values.items() if what != 'exit')}"
        + (f"  {one.error}" if one.error else "")
        for one in results.records
    ]


def main(options: argparse.Namespace) -> int:
    """Run and print. 1 if anything failed."""
    with session("correctness", options) as made:
        measure(made)
    for line in table(made.sink.results):
        print(line)
    return 1 if any(one.error for one in made.sink.results.records) else 0
