"""`python -m benchmarks correctness`: whether the kernels compute correct results on this GPU.

Runs the kernel tests below tests/ops with TRITON_INTERPRET=0, one file at a time while there is time. Runs
compute-sanitizer over one call of each operation if it is installed. Without a GPU: one small file in the interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.measure.results import Record, Results
from benchmarks.measure.session import Session, add_arguments, session

SUMMARY = "The kernels' tests on this GPU, and the compute sanitizer if it is there."
ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "ops"
SMALL = ("test_patch_embed_kernel.py",)
EXPRESSION = "not mutation and not long and not float32"
"""float16 and bfloat16; mutations run in the interpreter only."""
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


def files(cuda: bool) -> list[Path]:
    """The test files to run, the smallest first."""
    found = sorted(TESTS.rglob("test_*_kernel.py"), key=lambda path: path.stat().st_size)
    return found if cuda else [path for path in found if path.name in SMALL]


def _tests(made: Session, path: Path) -> None:
    name = path.name.removeprefix("test_").removesuffix("_kernel.py")
    labels = {"what": "tests", "group": name}
    with made.guarded(f"tests {name}", labels):
        made.need(5)
        command = [sys.executable, "-m", "pytest", str(path), "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
        command += ["-k", EXPRESSION if made.cuda else "mutation and not float32"]
        workers = min(len(os.sched_getaffinity(0)) // 2, 8) if made.cuda else 0
        command += ["-n", str(workers)]
        done = _run(command, made.left(), {"TRITON_INTERPRET": "0" if made.cuda else "1"})
        counts = {what: float(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", done.stdout)}
        # pytest's 5: nothing was chosen
        error = "" if done.returncode in (0, 5) else _last_line(done.stdout)
        made.sink.add(Record(f"tests {name}", labels, values={"exit": float(done.returncode), **counts}, error=error))


def _sanitizer(made: Session) -> None:
    labels = {"what": "compute sanitizer"}
    tool = shutil.which("compute-sanitizer")
    if tool is None or not made.cuda:
        made.sink.note("compute-sanitizer is not installed here, or there is no GPU: not run")
        return
    with made.guarded("compute sanitizer", labels):
        made.need(10)
        command = [tool, "--error-exitcode", "9", sys.executable, "-c", ONE_CALL]
        done = _run(command, min(made.left(), SANITIZER_SECONDS), {"TRITON_INTERPRET": "0"})
        error = "" if done.returncode == 0 else _last_line(done.stdout + done.stderr)
        values = {"exit": float(done.returncode)}
        made.sink.add(Record("compute sanitizer", labels, values=values, error=error))


def _run(command: list[str], seconds: float, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a separate process, since a faulty kernel can break its CUDA context."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    limit = None if seconds == float("inf") else max(seconds, 1.0)
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
    )


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if re.match(r"(FAILED|ERROR|E  |=+ ERROR SUMMARY)", line)]
    return (lines or text.strip().splitlines() or ["no output"])[-1][:300]


def measure(made: Session) -> None:
    """All groups while there is time; groups that passed before are skipped."""
    for path in files(made.cuda):
        if not made.sink.has(f"tests {path.name.removeprefix('test_').removesuffix('_kernel.py')}"):
            _tests(made, path)
    if not made.sink.has("compute sanitizer"):
        _sanitizer(made)


def table(results: Results) -> list[str]:
    """One line per group."""
    return [
        f"{one.key:<28} {one.error or ', '.join(f'{n:.0f} {what}' for what, n in one.values.items() if what != 'exit')}"
        for one in results.records
    ]


def main(options: argparse.Namespace) -> int:
    """Run and print. 1 if anything failed."""
    with session("correctness", options) as made:
        measure(made)
    for line in table(made.sink.results):
        print(line)
    return 1 if any(one.error for one in made.sink.results.records) else 0
