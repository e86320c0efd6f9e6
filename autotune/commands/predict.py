"""`python -m autotune predict`: choose configurations by their predicted times, for a GPU that is not at hand.

Every candidate's machine code is compiled ahead of time and run through the cycle model of `python -m benchmarks
predict`; predictions are cached, so that an interrupted run resumes. With --write the choices become the package's
file of predicted configurations for that GPU, which a file of measured ones always precedes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from autotune.commands.options import GPU, add_targets, positive_int, targets
from autotune.search.predicted import Search, search
from autotune.search.store import write_predicted
from benchmarks.predict import store
from benchmarks.predict.model import Prediction
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.device import Gpu

SUMMARY = "Choose configurations by predicted times, for a GPU that is not at hand; needs a C++ compiler."
CACHE = Path("build/autotune/predicted.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_targets(parser)
    parser.add_argument("--gpu", type=GPU, default="90", help="sm_90, or a GPU's name (sm_90)")
    parser.add_argument("--limit", type=positive_int, default=6, metavar="N", help="candidates per item and round (6)")
    parser.add_argument("--rounds", type=positive_int, default=2, metavar="N", help="rounds of neighbors (2)")
    workers = os.cpu_count() or 2
    parser.add_argument("--workers", type=positive_int, default=workers, metavar="N", help=f"processes ({workers})")
    parser.add_argument("--write", action="store_true", help="replace the package's file for this GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table to this file")


def main(options: argparse.Namespace) -> int:
    """Print the table, and write the file on request. ValueError for a GPU whose times cannot be predicted."""
    gpu: Gpu = options.gpu
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    known = store.read(CACHE)

    def keep(found: Mapping[str, Prediction]) -> None:
        known.update(found)
        store.write(known, CACHE)

    predict = functools.partial(store.predict_all, stored=known, workers=options.workers, keep=keep)
    found = search(targets(options), gpu, predict, limit=options.limit, rounds=options.rounds)
    for line in table(found):
        print(line)
    if options.json:
        rows = [dataclasses.asdict(row) for row in map(row_of, found)]
        options.json.write_text(json.dumps({"gpu": gpu.name, "items": rows}, indent=1) + "\n", encoding="utf-8")
    if options.write:
        path = configs.PREDICTED / configs.file_name(gpu.name)
        write_predicted(path, config_file.facts(gpu), [one for one in map(Search.entry, found) if one is not None])
        print(f"written to {path}")
    return 0


@dataclasses.dataclass(frozen=True)
class Row:
    """An item: its calls, the predicted microseconds of one before and with the best; how many configurations tried."""

    op: str
    bucket: str
    calls: int
    incumbent_us: float
    best_us: float
    tried: int
    config: dict[str, object]


def row_of(one: Search) -> Row:
    """The item's line of the table."""
    us = (round(one.incumbent_us, 3), round(one.best_us, 3))
    return Row(one.item.op, one.item.bucket, one.item.calls, *us, len(one.us), one.best.fields)


def table(found: Sequence[Search]) -> list[str]:
    """One line per item with a faster configuration, the largest gain first, then the totals."""
    gains = sorted(found, key=lambda one: one.item.calls * (one.best_us - one.incumbent_us))
    lines = []
    for one in gains:
        if one.best is not one.found.incumbent:
            times = f"{one.incumbent_us:8.2f} -> {one.best_us:8.2f} us"
            fields = " ".join(f"{name}={value}" for name, value in one.best.fields.items())
            lines.append(f"{one.item.calls:>4} x {times}  {one.item.key}: {fields}")
    before = sum(one.item.calls * one.incumbent_us for one in found)
    after = sum(one.item.calls * one.best_us for one in found)
    tried = sum(len(one.us) for one in found)
    lines.append(f"{len(found)} items, {tried} configurations: {before:.0f} -> {after:.0f} us in all, predicted")
    return lines
