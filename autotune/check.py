"""`python -m autotune check`: compile the candidates of all work items ahead of time; no GPU is needed.

Says how many candidates there are, how many are removed before anything is timed, and why.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autotune.builder import Builder
from autotune.candidates import Candidate, candidates
from autotune.model import Built, predict
from autotune.options import GPU, add_targets, targets, whole
from autotune.work import Item, Target, all_items
from benchmarks.limits import Ceilings, ceilings
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import Gpu

SUMMARY = "How many candidates there are and which are removed before anything is timed; needs no GPU."
BEYOND = "beyond --limit"


@dataclass(frozen=True)
class Row:
    """An item: how many configurations its space names, how many are left, and why the others are not."""

    op: str
    bucket: str
    calls: int
    share: float
    named: int
    left: int
    removed: dict[str, int]
    best: str


@dataclass(frozen=True)
class Checked:
    """The outcome. compilations: distinct ones; many candidates share theirs with others."""

    targets: tuple[str, ...]
    gpu: str
    rows: tuple[Row, ...]
    compilations: int
    seconds: float

    @property
    def removed(self) -> Counter[str]:
        """Reasons of all items together."""
        return sum((Counter(row.removed) for row in self.rows), Counter[str]())


def check(wanted: Sequence[Target], gpu: Gpu, workers: int, limit: int | None = None) -> Checked:
    """Compile every candidate, or for each item the `limit` most promising by the model."""
    started = time.perf_counter()
    items = all_items(wanted, gpu)
    most = ceilings(gpu)
    floors = {item.key: item.calls * most.floor(item.cost, item.single) for item in items}
    items.sort(key=lambda item: -floors[item.key])
    builder = Builder(gpu, workers)
    everything = sum(floors.values())
    try:
        shown = tqdm(items, unit="item", disable=not sys.stderr.isatty())
        rows = [_row(item, floors[item.key] / everything, gpu, most, builder, limit) for item in shown]
    finally:
        builder.stop()
    names = tuple(target.name for target in wanted)
    return Checked(names, gpu.name, tuple(rows), len(builder.known), round(time.perf_counter() - started, 1))


def _row(item: Item, share: float, gpu: Gpu, most: Ceilings, builder: Builder, limit: int | None) -> Row:
    incumbent = configs.choose(item.op, item.implementation, gpu, item.arguments).config
    found = candidates(item, gpu, incumbent)
    removed = Counter(found.removed)
    named = len(found.all) + sum(removed.values())
    ordered = sorted(found.all, key=lambda c: (c is not found.incumbent, predict(item, c, gpu, most)))
    taken = ordered[:limit]
    if len(taken) < len(ordered):
        removed[BEYOND] = len(ordered) - len(taken)
    left: list[tuple[Candidate, Built]] = []
    for candidate, built in zip(taken, builder.build(taken), strict=True):
        if built.faults:
            removed[built.faults[0]] += 1
        else:
            left.append((candidate, built))
    best = min(left, key=lambda pair: predict(item, pair[0], gpu, most, pair[1]), default=None)
    text = "" if best is None else " ".join(f"{k}={v}" for k, v in best[0].fields.items())
    return Row(item.op, item.bucket, item.calls, round(share, 5), named, len(left), dict(removed), text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_targets(parser)
    parser.add_argument("--arch", "--gpu", dest="gpu", type=GPU, default="90", help="sm_90, or a GPU's name (sm_90)")
    parser.add_argument("--limit", type=whole, metavar="N", help="candidates of an item, the best by the model (all)")
    parser.add_argument("--workers", type=whole, default=2, metavar="N", help="compilations at a time (default 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")


def main(options: argparse.Namespace) -> int:
    """Print what was found. 1 if an item has no candidate left."""
    made = check(targets(options), options.gpu, options.workers, options.limit)
    for line in table(made):
        print(line)
    if options.json:
        content: dict[str, Any] = {**dataclasses.asdict(made), "removed": dict(made.removed)}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if any(row.left == 0 for row in made.rows) else 0


def table(made: Checked) -> list[str]:
    """A line an item, most of the time first, then the sums."""
    width = max((len(f"{row.op} {row.bucket}") for row in made.rows), default=4)
    lines = [f"{', '.join(made.targets)}; compiled for {made.gpu}"]
    lines.append(f"{'item':<{width}} {'calls':>5} {'share':>6} {'named':>6} {'left':>5}  best by the model")
    for row in made.rows:
        name = f"{row.op} {row.bucket}"
        lines.append(f"{name:<{width}} {row.calls:>5} {row.share:>6.1%} {row.named:>6} {row.left:>5}  {row.best}")
    named, left = sum(row.named for row in made.rows), sum(row.left for row in made.rows)
    lines.append("")
    lines.append(f"{len(made.rows)} items, {named} candidates, {named - left} removed:")
    lines += [f"  {count:>6} {reason}" for reason, count in made.removed.most_common()]
    lines.append(f"{left} left; {made.compilations} distinct compilations, {made.seconds:.0f} s in all")
    return lines
