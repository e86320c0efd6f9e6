"""`python -m autotune check`: compile the candidates of all work items ahead of time; no GPU is needed.

Reports how many candidates there are, how many are removed before timing, and why. Compilations are cached
(`builder.py`), so a check that was interrupted, or stopped by --seconds, resumes when it is run again.
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

from autotune.commands.options import GPU, add_targets, positive_int, targets
from autotune.device.builder import CACHE, Builder
from autotune.items.candidates import Candidate, candidates
from autotune.items.cost_model import Built, predict
from autotune.items.work import Item, Target, all_items
from benchmarks.hardware import Ceilings, ceilings
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.versions import installed

SUMMARY = "Compile all candidates: how many there are and why some are removed before timing; needs no GPU."
CHUNK = 8
"""Candidates of an item that are compiled before the next item's turn."""


@dataclass
class ItemState:
    """An item's candidates, the incumbent first, the others ranked by the cost model; and their compilations so far."""

    item: Item
    share: float
    ordered: list[Candidate]
    removed: Counter[str]
    built: list[Built] = field(default_factory=list)

    @property
    def clean(self) -> list[tuple[Candidate, Built]]:
        """The compiled candidates without faults."""
        return [(c, b) for c, b in zip(self.ordered, self.built, strict=False) if not b.faults]


@dataclass(frozen=True)
class Row:
    """An item: how many configurations its space has, how many are left, and why the others were removed.

    skipped: how many were not compiled because of --limit or --seconds; fault: of the incumbent; best: by the model.
    """

    op: str
    bucket: str
    calls: int
    share: float
    total: int
    left: int
    removed: dict[str, int]
    skipped: int
    fault: str
    best: str


@dataclass(frozen=True)
class CheckResult:
    """The result. compilations: how many distinct ones; compiled: how many of them were not in the cache."""

    targets: tuple[str, ...]
    gpu: str
    triton: str
    rows: tuple[Row, ...]
    compilations: int
    compiled: int
    seconds: float

    @property
    def removed(self) -> Counter[str]:
        """Removed candidates of all items, by reason."""
        return sum((Counter(row.removed) for row in self.rows), Counter[str]())


def check(
    wanted: Sequence[Target],
    gpu: Gpu,
    workers: int,
    *,
    limit: int | None = None,
    seconds: float = math.inf,
    cache: Path | None = CACHE,
) -> CheckResult:
    """Compile every candidate, or the `limit` best per item by the cost model, for at most `seconds`."""
    started = time.perf_counter()
    limits = ceilings(gpu)
    states = _states(wanted, gpu, limits)
    builder = Builder(gpu, workers, cache)
    everything = [c for work in states for c in work.ordered[:limit]]
    uncached = len(builder.uncached(everything))
    begun = time.perf_counter()
    try:
        with tqdm(total=uncached, unit="kernel", disable=not sys.stderr.isatty()) as bar:
            # Round-robin, so that every item's most promising candidates come before any item's last.
            for first in range(0, max((len(work.ordered) for work in states), default=0), CHUNK):
                for work in states:
                    chunk = work.ordered[first : min(first + CHUNK, limit or first + CHUNK)]
                    late = time.perf_counter() - begun >= seconds and builder.uncached(chunk)
                    if len(work.built) == first and not late:
                        work.built += builder.build(chunk, bar.update)
    finally:
        builder.stop()
    rows = tuple(_row(work, gpu, limits) for work in states)
    names = tuple(target.name for target in wanted)
    distinct = {v.digest for c in everything for v in builder.variants(c)} & set(builder.known)
    spent = round(time.perf_counter() - started, 1)
    return CheckResult(names, gpu.name, installed("triton"), rows, len(distinct), builder.compiled, spent)


def _states(wanted: Sequence[Target], gpu: Gpu, limits: Ceilings) -> list[ItemState]:
    """All items with their candidates, ordered by their share of the end-to-end floor."""
    items = all_items(wanted, gpu)
    floors = {item.key: item.calls * limits.floor(item.cost, item.bits) for item in items}
    made = []
    for item in sorted(items, key=lambda item: -floors[item.key]):
        incumbent = item.call.choose(gpu).config
        found = candidates(item, gpu, incumbent)
        ordered = sorted(found.all, key=lambda c: (c is not found.incumbent, predict(item, c, gpu, limits)))
        made.append(ItemState(item, floors[item.key] / sum(floors.values()), ordered, Counter(found.removed)))
    return made


def _row(work: ItemState, gpu: Gpu, limits: Ceilings) -> Row:
    removed = work.removed + Counter(b.faults[0] for b in work.built if b.faults)
    best = min(work.clean, key=lambda pair: predict(work.item, pair[0], gpu, limits, pair[1]), default=None)
    return Row(
        op=work.item.op,
        bucket=work.item.bucket,
        calls=work.item.calls,
        share=round(work.share, 5),
        total=len(work.ordered) + work.removed.total(),
        left=len(work.clean),
        removed=dict(removed),
        skipped=len(work.ordered) - len(work.built),
        fault=", ".join(work.built[0].faults) if work.built else "",
        best="" if best is None else " ".join(f"{k}={v}" for k, v in best[0].fields.items()),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_targets(parser)
    parser.add_argument("--arch", "--gpu", dest="gpu", type=GPU, default="90", help="sm_90, or a GPU's name (sm_90)")
    parser.add_argument(
        "--limit", type=positive_int, metavar="N", help="candidates per item, the best by the cost model (all)"
    )
    parser.add_argument("--seconds", type=positive_int, metavar="S", help="stop compiling after this time (no limit)")
    parser.add_argument(
        "--workers", type=positive_int, default=2, metavar="N", help="parallel compilations (default 2)"
    )
    parser.add_argument("--fresh", action="store_true", help="ignore the cache of earlier compilations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file")


def main(options: argparse.Namespace) -> int:
    """Print the table. 1 if an incumbent has a fault, or an item has no candidate left."""
    made = check(
        targets(options),
        options.gpu,
        options.workers,
        limit=options.limit,
        seconds=options.seconds or math.inf,
        cache=None if options.fresh else CACHE,
    )
    for line in table(made):
        print(line)
    if options.json:
        content: dict[str, Any] = {**dataclasses.asdict(made), "removed": dict(made.removed)}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    bad = [row for row in made.rows if row.fault or (row.left == 0 and not row.skipped)]
    for row in bad:
        print(f"{row.op} {row.bucket}: {row.fault or 'no candidate is left'}", file=sys.stderr)
    return 1 if bad else 0


def table(made: CheckResult) -> list[str]:
    """One line per item, by share of the end-to-end floor, then the totals."""
    width = max((len(f"{row.op} {row.bucket}") for row in made.rows), default=4)
    lines = [f"{', '.join(made.targets)}; compiled for {made.gpu} by Triton {made.triton}"]
    lines.append(
        f"{'item':<{width}} {'calls':>5} {'share':>6} {'total':>6} {'left':>5} {'skipped':>7}  best by the model"
    )
    for row in made.rows:
        numbers = f"{row.calls:>5} {row.share:>6.1%} {row.total:>6} {row.left:>5} {row.skipped:>7}"
        lines.append(f"{f'{row.op} {row.bucket}':<{width}} {numbers}  {row.best}")
    total, left = sum(row.total for row in made.rows), sum(row.left for row in made.rows)
    skipped = sum(row.skipped for row in made.rows)
    lines.append("")
    lines.append(f"{len(made.rows)} items, {total} candidates, {total - left - skipped} removed:")
    lines += [f"  {count:>6} {reason}" for reason, count in made.removed.most_common()]
    if skipped:
        lines.append(f"{skipped} not compiled (--limit, --seconds)")
    lines.append(
        f"{left} left; {made.compilations} distinct compilations, {made.compiled} of them not cached, "
        f"{made.seconds:.0f} s in total"
    )
    return lines
