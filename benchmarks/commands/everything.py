"""`python -m benchmarks all --out DIR`: every measurement, in order of importance, within 9 minutes on one GPU.

Each stage is a separate process with its share of the time and writes results as it measures. A stage that fails, hangs
or is interrupted does not affect other stages, and keeps its results. The same command with the same DIR resumes.
--count estimates what compiling kernels takes of that time (`compilations.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.commands import compilations
from benchmarks.measure.results import read

SUMMARY = "All measurements within 9 minutes on one GPU; can be interrupted and resumed."
BUDGET = 525.0
"""Seconds: nine minutes minus start-up and shutdown."""
GRACE = 5.0
"""Seconds for a stage to write its file after its time is over."""
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Stage:
    """A command and its share of the time; unused time goes to the following stages."""

    command: str
    share: float


STAGES = (
    Stage("ceilings", 0.04),
    Stage("correctness", 0.16),
    Stage("e2e", 0.42),
    Stage("micro", 0.22),
    Stage("quality", 0.06),
    Stage("soak", 0.10),
)
Run = Callable[[list[str], float], int]


def run_stage(command: list[str], seconds: float) -> int:
    """Run in a process group of its own; interrupted when its time is over, killed when that does not help."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        return _end(process)
    except KeyboardInterrupt:
        _end(process)
        raise


def _end(process: subprocess.Popen[bytes]) -> int:
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(GRACE)
    return -signal.SIGKILL


def finished(path: Path) -> bool:
    """Whether a stage has measured everything already."""
    try:
        return path.exists() and read(path).complete
    except (ValueError, OSError):
        return False


def everything(out: Path, budget: float, *, cpu: bool = False, run: Run = run_stage) -> dict[str, str]:
    """Run all unfinished stages; returns the outcome of each."""
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget
    waiting = [stage for stage in STAGES if not finished(out / f"{stage.command}.json")]
    outcomes = {stage.command: "finished before" for stage in STAGES if stage not in waiting}
    for i, stage in enumerate(waiting):
        left = end - time.monotonic()
        seconds = left * stage.share / sum(one.share for one in waiting[i:])
        path = out / f"{stage.command}.json"
        command = [sys.executable, "-m", "benchmarks", stage.command, "--json", str(path), "--budget", f"{seconds:.0f}"]
        print(f"== {stage.command}: {seconds:.0f} s of {left:.0f}", flush=True)
        try:
            code = run([*command, *(["--cpu"] if cpu else [])], seconds)
        except KeyboardInterrupt:
            outcomes[stage.command] = "interrupted"
            print(f"interrupted; results are in {out}, and the same command resumes")
            break
        outcomes[stage.command] = "done" if code == 0 else f"exit code {code}"
        if not finished(path):
            outcomes[stage.command] += ", not everything"
    return outcomes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"), metavar="DIR", help="(build/benchmarks)")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="S", help=f"seconds in all ({BUDGET:.0f})")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, in reduced sizes, although there is a GPU")
    parser.add_argument("--count", action="store_true", help="only count the kernels that the stages would compile")


def main(options: argparse.Namespace) -> int:
    """Run, write the report, print each stage's outcome. 1 unless all are done; 130 if interrupted."""
    if options.count:
        print("\n".join(compilations.table(compilations.count(compilations.stages()))))
        return 0
    outcomes = everything(options.out, options.budget, cpu=options.cpu)
    if any(options.out.glob("*.json")):
        run_stage([sys.executable, "-m", "benchmarks", "report", str(options.out.absolute())], 60.0)
    for command, what in outcomes.items():
        print(f"{command:<12} {what}")
    if "interrupted" in outcomes.values():
        return 130
    return 0 if all(what in ("done", "finished before") for what in outcomes.values()) else 1
