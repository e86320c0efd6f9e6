"""`python -m autotune check`: compile the candidates of all work items ahead of time; no GPU is needed.

Says how many candidates there are, how many are removed before anything is timed, and why. What was compiled before is
recalled (`builder.py`), so a check that was interrupted, or cut short by --seconds, goes on when it is run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from autotune.commands.options import GPU, add_targets, targets, whole
from autotune.device.builder import KEPT, Builder
from autotune.items.candidates import Candidate, candidates
from autotune.items.cost_model import Built, predict
from autotune.items.work import Item, Target, all_items
from benchmarks.hardware import Ceilings, ceilings
from tinysr_kernels.launch.config_file import installed
from tinysr_kernels.launch.device import Gpu

SUMMARY = "How many candidates there are and which are removed before anything is timed; needs no GPU."
CHUNK = 8
"""Candidates of an item that are compiled before it is another item's turn."""


@dataclass
class Work:
    """An item's candidates, what runs today first and then by the model, and what compilation found so far."""

    item: Item
    share: float
    ordered: list[Candidate]
    removed: Counter[str]
    built: list[Built] = field(default_factory=list)

    @property
    def clean(self) -> list[tuple[Candidate, Built]]:
        """What nothing speaks against."""
        return [(c, b) for c, b in zip(self.ordered, self.built, strict=False) if not b.faults]


@dataclass(frozen=True)
class Row:
    """An item: how many configurations its space names, how many are left, and why the others are not.

    unseen: how many were not compiled, because of --limit or --seconds; fault: of what runs today; best: by the model.
    """

    op: str
    bucket: str
    calls: int
    share: float
    named: int
    left: int
    removed: dict[str, int]
    unseen: int
    fault: str
    best: str


@dataclass(frozen=True)
class Checked:
    """The outcome. compilations: how many distinct ones, and how many of them were made now and not recalled."""

    targets: tuple[str, ...]
    gpu: str
    triton: str
    rows: tuple[Row, ...]
    compilations: int
    compiled: int
    seconds: float

    @property
    def removed(self) -> Counter[str]:
        """Reasons of all items together."""
        return sum((Counter(row.removed) for row in self.rows), Counter[str]())


def check(
    wanted: Sequence[Target],
    gpu: Gpu,
    workers: int,
    *,
    limit: int | None = None,
    seconds: float = math.inf,
    kept: Path | None = KEPT,
) -> Checked:
    """Compile every candidate, or for each item the `limit` most promising by the model, for so many seconds."""
    started = time.perf_counter()
    most = ceilings(gpu)
    works = _works(wanted, gpu, most)
    builder = Builder(gpu, workers, kept)
    everything = [c for work in works for c in work.ordered[:limit]]
    missing = len(builder.missing(everything))
    begun = time.perf_counter()
    try:
        with tqdm(total=missing, unit="kernel", disable=not sys.stderr.isatty()) as bar:
            # In turns, so that every item's most promising candidates come before any item's last.
            for first in range(0, max((len(work.ordered) for work in works), default=0), CHUNK):
                for work in works:
                    chunk = work.ordered[first : min(first + CHUNK, limit or first + CHUNK)]
                    late = time.perf_counter() - begun >= seconds and builder.missing(chunk)
                    if len(work.built) == first and not late:
                        work.built += builder.build(chunk, bar.update)
    finally:
        builder.stop()
    rows = tuple(_row(work, gpu, most) for work in works)
    names = tuple(target.name for target in wanted)
    distinct = {v.digest for c in everything for v in builder.variants(c)} & set(builder.known)
    spent = round(time.perf_counter() - started, 1)
    return Checked(names, gpu.name, installed("triton"), rows, len(distinct), builder.compiled, spent)


def _works(wanted: Sequence[Target], gpu: Gpu, most: Ceilings) -> list[Work]:
    """All items with their candidates, those with most of the time first."""
    items = all_items(wanted, gpu)
    floors = {item.key: item.calls * most.floor(item.cost, item.bits) for item in items}
    made = []
    for item in sorted(items, key=lambda item: -floors[item.key]):
        incumbent = item.call.choose(gpu).config
        found = candidates(item, gpu, incumbent)
        ordered = sorted(found.all, key=lambda c: (c is not found.incumbent, predict(item, c, gpu, most)))
        made.append(Work(item, floors[item.key] / sum(floors.values()), ordered, Counter(found.removed)))
    return made


def _row(work: Work, gpu: Gpu, most: Ceilings) -> Row:
    removed = work.removed + Counter(b.faults[0] for b in work.built if b.faults)
    best = min(work.clean, key=lambda pair: predict(work.item, pair[0], gpu, most, pair[1]), default=None)
    return Row(
        op=work.item.op,
        bucket=work.item.bucket,
        calls=work.item.calls,
        share=round(work.share, 5),
        named=len(work.ordered) + work.removed.total(),
        left=len(work.clean),
        removed=dict(removed),
        unseen=len(work.ordered) - len(work.built),
        fault=", ".join(work.built[0].faults) if work.built else "",
        best="" if best is None else " ".join(f"{k}={v}" for k, v in best[0].fields.items()),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_targets(parser)
    parser.add_argument("--arch", "--gpu", dest="gpu", type=GPU, default="90", help="sm_90, or a GPU's name (sm_90)")
    parser.add_argument("--limit", type=whole, metavar="N", help="candidates of an item, the best by the model (all)")
    parser.add_argument("--seconds", type=whole, metavar="S", help="compile for so long and no longer (no limit)")
    parser.add_argument("--workers", type=whole, default=2, metavar="N", help="compilations at a time (default 2)")
    parser.add_argument("--fresh", action="store_true", help="compile also what was compiled before")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there")


def main(options: argparse.Namespace) -> int:
    """Print what was found. 1 if what runs today is at fault, or an item has no candidate left."""
    made = check(
        targets(options),
        options.gpu,
        options.workers,
        limit=options.limit,
        seconds=options.seconds or math.inf,
        kept=None if options.fresh else KEPT,
    )
    for line in table(made):
        print(line)
    if options.json:
        content: dict[str, Any] = {**dataclasses.asdict(made), "removed": dict(made.removed)}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    bad = [row for row in made.rows if row.fault or (row.left == 0 and not row.unseen)]
    for row in bad:
        print(f"{row.op} {row.bucket}: {row.fault or 'no candidate is left'}", file=sys.stderr)
    return 1 if bad else 0


def table(made: Checked) -> list[str]:
    """A line an item, most of the time first, then the sums."""
    width = max((len(f"{row.op} {row.bucket}") for row in made.rows), default=4)
    lines = [f"{', '.join(made.targets)}; compiled for {made.gpu} by Triton {made.triton}"]
    lines.append(
        f"{'item':<{width}} {'calls':>5} {'share':>6} {'named':>6} {'left':>5} {'unseen':>6}  best by the model"
    )
    for row in made.rows:
        numbers = f"{row.calls:>5} {row.share:>6.1%} {row.named:>6} {row.left:>5} {row.unseen:>6}"
        lines.append(f"{f'{row.op} {row.bucket}':<{width}} {numbers}  {row.best}")
    named, left = sum(row.named for row in made.rows), sum(row.left for row in made.rows)
    unseen = sum(row.unseen for row in made.rows)
    lines.append("")
    lines.append(f"{len(made.rows)} items, {named} candidates, {named - left - unseen} removed:")
    lines += [f"  {count:>6} {reason}" for reason, count in made.removed.most_common()]
    if unseen:
        lines.append(f"{unseen} not compiled (--limit, --seconds)")
    lines.append(
        f"{left} left; {made.compilations} distinct compilations, {made.compiled} of them made now, "
        f"{made.seconds:.0f} s in all"
    )
    return lines
