"""`python -m autotune run`: tune on this machine's GPU within a budget; keep configurations that are faster end to end.

Every measurement is logged next to the configuration file, in NAME.samples.jsonl. A run that was killed, or is started
again with a larger budget, resumes from there. Time spent in earlier runs counts towards the budget.
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
from autotune.commands.options import add_targets, positive_int, targets
from autotune.device.gpu import CudaDevice
from autotune.items.work import all_items
from autotune.search.search import Race
from autotune.search.tuning import Outcome, tune
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch import configs

SUMMARY = "Find the fastest configurations for this GPU and keep them if models become faster end to end."

BUSY = 5
"""Percent of utilization by other processes to warn at; an idle GPU shows 0, one with a desktop a few."""

TOLERATED_FRACTION = 0.05
"""Fraction of the samples that may be disturbed without a warning: medians are robust to it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_targets(parser)
    parser.add_argument("--device", type=int, default=0, metavar="N", help="CUDA device (default 0)")
    parser.add_argument(
        "--budget", type=positive_int, default=600, metavar="S", help="seconds, over all runs together (600)"
    )
    workers = max((os.cpu_count() or 2) - 1, 1)
    parser.add_argument(
        "--workers", type=positive_int, default=workers, metavar="N", help=f"parallel compilations ({workers})"
    )
    parser.add_argument("--fresh", action="store_true", help="discard the log of earlier runs")
    folder = Path("build/autotune")
    parser.add_argument(
        "--report", type=Path, default=folder, metavar="FOLDER", help="write the report there (build/autotune)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there as well")


def log_of(file: Path) -> Path:
    """The log of measurements of a configuration file."""
    return file.with_name(file.stem + ".samples.jsonl")


def main(options: argparse.Namespace) -> int:
    """Tune, write the report, print a summary. InputError without a GPU, OSError where nothing can be written; both
    before any tuning."""
    if not torch.cuda.is_available() or options.device >= torch.cuda.device_count():
        raise InputError(
            f"tuning needs CUDA device {options.device}, and torch finds {torch.cuda.device_count()} here; "
            "`python -m autotune check --arch sm_90` needs no GPU"
        )
    wanted = targets(options)
    for folder in (configs.user_folder(), options.report):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    device = CudaDevice(options.device, options.workers)
    try:
        gpu = device.facts.gpu
        file = configs.user_file(gpu.name)
        if options.fresh:
            log_of(file).unlink(missing_ok=True)
        items = all_items(wanted, gpu)
        print(f"{gpu.name}: {len(items)} launches of {', '.join(target.name for target in wanted)}")
        if device.busy > BUSY:
            print(f"other processes use the GPU {device.busy} % of the time: timings will be noisy", file=sys.stderr)
        with Progress(options.budget) as progress:
            outcome = tune(
                wanted,
                items,
                device,
                file,
                budget=options.budget,
                samples=log_of(file),
                progress=progress.spend,
                on_batch=progress.show,
            )
    finally:
        device.stop()
    for path in report.write(options.report, outcome, device.facts):
        print(path)
    if options.json:
        options.json.write_text(json.dumps(report.to_json(outcome, device.facts), indent=1) + "\n", encoding="utf-8")
    for line in summary(outcome, file):
        print(line)
    return 0


def summary(outcome: Outcome, file: Path) -> list[str]:
    """The result of a run in a few lines."""
    timed = [one for one in outcome.models if one.failure is None]
    lines = [f"{one.target.name}: {one.before_us:.1f} -> {one.after_us:.1f} us" for one in timed]
    won = sum(race.won for race in outcome.races)
    samples, disturbed = (outcome.counts.get(name, 0) for name in ("samples", "still disturbed"))
    if disturbed > TOLERATED_FRACTION * samples:
        lines.append(f"{disturbed} of {samples} samples were disturbed: run again with --fresh on a quiet GPU")
    lines.append(f"{won} of {len(outcome.races)} launches have a faster configuration; {outcome.why}")
    if outcome.pdl_models:
        lines.append(f"programmatic dependent launch is {report.on_off(outcome.pdl)}")
    lines.append(f"written to {file}" if outcome.written else "the configuration file is unchanged")
    return lines


class Progress:
    """A progress bar over the budget, with the time left and the gain so far."""

    def __init__(self, budget: float) -> None:
        self._bar = tqdm(total=budget, unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}")
        self._gains: dict[str, float] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def spend(self, seconds: float) -> None:
        """Show how many seconds of the budget are spent."""
        # update() redraws only a few times per second.
        self._bar.update(min(seconds, self._bar.total) - self._bar.n)

    def show(self, race: Race) -> None:
        """Show the gain after a batch of this race."""
        self._gains[race.item.key] = report.gained_us(race)
        left = self._bar.total - self._bar.n
        self._bar.set_postfix_str(f"{left:.0f} s left, {sum(self._gains.values()):.1f} us gained, {race.item.key}")
