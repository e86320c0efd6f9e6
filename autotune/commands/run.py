"""`python -m autotune run`: tune on this machine's GPU, within a budget, and keep what wins end to end.

Every measurement is kept beside the file of configurations, NAME.samples.jsonl: a run that is killed, or started again
with a larger budget, goes on from there. What earlier runs spent counts towards the budget.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from autotune.commands import report
from autotune.commands.options import add_targets, targets, whole
from autotune.device.gpu import RealDevice
from autotune.items.work import all_items
from autotune.search.search import Race
from autotune.search.tuning import Outcome, tune
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch import configs

SUMMARY = "Find the fastest configurations for this GPU and keep them if whole models become faster."

BUSY = 5
"""Percent; an idle GPU shows 0, one with a desktop on it a few."""

TOLERATED = 0.05
"""Part of the readings that may be disturbed: medians do not mind."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_targets(parser)
    parser.add_argument("--device", type=int, default=0, metavar="N", help="CUDA device (default 0)")
    parser.add_argument("--budget", type=whole, default=600, metavar="S", help="seconds in all runs together (600)")
    workers = max((os.cpu_count() or 2) - 1, 1)
    parser.add_argument(
        "--workers", type=whole, default=workers, metavar="N", help=f"compilations at a time ({workers})"
    )
    parser.add_argument("--fresh", action="store_true", help="forget what earlier runs measured")
    folder = Path("build/autotune")
    parser.add_argument("--report", type=Path, default=folder, metavar="FOLDER", help="for the report (build/autotune)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every reading there as well")


def samples_of(file: Path) -> Path:
    """Where the measurements behind a file of configurations are kept."""
    return file.with_name(file.stem + ".samples.jsonl")


def main(options: argparse.Namespace) -> int:
    """Tune, write the report, say what came of it. InputError where there is no GPU, OSError where nothing can be
    written: before the time is spent."""
    if not torch.cuda.is_available() or options.device >= torch.cuda.device_count():
        raise InputError(
            f"tuning needs CUDA device {options.device}, and torch finds {torch.cuda.device_count()} here; "
            "`python -m autotune check --arch sm_90` needs none"
        )
    wanted = targets(options)
    for folder in (configs.user_folder(), options.report):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    device = RealDevice(options.device, options.workers)
    try:
        gpu = device.facts.gpu
        file = configs.user_file(gpu.name)
        if options.fresh:
            samples_of(file).unlink(missing_ok=True)
        items = all_items(wanted, gpu)
        print(f"{gpu.name}: {len(items)} launches of {', '.join(target.name for target in wanted)}")
        if device.busy > BUSY:
            print(f"others keep the GPU busy {device.busy} % of the time: the outcome will be poor", file=sys.stderr)
        with Progress(options.budget) as progress:
            outcome = tune(
                wanted,
                items,
                device,
                file,
                budget=options.budget,
                samples=samples_of(file),
                progress=progress.spend,
                say=progress.tell,
            )
    finally:
        device.stop()
    for path in report.write(options.report, outcome, device.facts):
        print(path)
    if options.json:
        options.json.write_text(json.dumps(report.readings(outcome, device.facts), indent=1) + "\n", encoding="utf-8")
    for line in summary(outcome, file):
        print(line)
    return 0


def summary(outcome: Outcome, file: Path) -> list[str]:
    """What came of a run, in a few lines."""
    timed = [one for one in outcome.wholes if one.failure is None]
    lines = [f"{one.target.name}: {one.before_us:.1f} -> {one.after_us:.1f} us" for one in timed]
    won = sum(race.won for race in outcome.races)
    readings, disturbed = (outcome.counts.get(name, 0) for name in ("samples", "still disturbed"))
    if disturbed > TOLERATED * readings:
        lines.append(f"{disturbed} of {readings} readings were disturbed: run again with --fresh on a quiet GPU")
    lines.append(f"{won} of {len(outcome.races)} launches have a faster configuration; {outcome.why}")
    if outcome.pdl_wholes:
        lines.append(f"programmatic dependent launch is {report.state(outcome.pdl)}")
    lines.append(f"written to {file}" if outcome.written else "nothing was written")
    return lines


class Progress:
    """A bar over the budget with the time left, and the gain so far."""

    def __init__(self, budget: float) -> None:
        self._bar = tqdm(total=budget, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}")
        self._gains: dict[str, float] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def spend(self, seconds: float) -> None:
        """So much of the budget is spent."""
        # By update, which draws no oftener than a few times a second.
        self._bar.update(min(seconds, self._bar.total) - self._bar.n)

    def tell(self, race: Race) -> None:
        """A batch of this race has ended."""
        self._gains[race.item.key] = report.gained_us(race)
        left = self._bar.total - self._bar.n
        self._bar.set_postfix_str(f"{left:.0f} s left, {sum(self._gains.values()):.1f} us gained, {race.item.key}")
