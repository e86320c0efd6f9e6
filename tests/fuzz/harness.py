"""Run a fuzzer's cases in a child process with a limit of time for each case and a limit of memory.

A fuzzer is a module of this folder with `case(seed, folder)`: it makes an input from the seed in the empty folder,
hands it to the package and returns the outcome in a word, such as "accepted" or the name of a documented error. What it
raises is a fault, and so are a hang, a crash, and memory beyond the limit. It may set SECONDS and MEMORY (bytes beyond
what the child holds at its start), and `setup()`, which runs once in each child.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests import ROOT

FUZZERS = ("checkpoints", "objects", "images", "films", "configurations", "command_lines")
SECONDS = 20.0
MEMORY = 2 << 30


@dataclass
class Report:
    """What became of a fuzzer's cases. faults: by seed. peak_bytes: resident memory that the cases added."""

    fuzzer: str
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0
    slowest_seconds: float = 0.0
    slowest_seed: int = 0
    peak_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The report for a JSON file."""
        return {**asdict(self), "outcomes": dict(self.outcomes)}  # asdict makes a Counter of pairs of a Counter


def _bytes_of(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def work(name: str, first: int, last: int) -> None:
    """In the child: run the cases first..last-1 and print a line of JSON before and after each one."""
    out = os.fdopen(os.dup(1), "w", buffering=1)  # a case may close or fill stdout
    fuzzer = importlib.import_module(f"tests.fuzz.{name}")
    getattr(fuzzer, "setup", lambda: None)()
    limit = _bytes_of("VmData") + getattr(fuzzer, "MEMORY", MEMORY)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    held = _bytes_of("VmHWM")
    for seed in range(first, last):
        folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-{seed}-"))
        line: dict[str, Any] = {"seed": seed}
        out.write(json.dumps(line) + "\n")
        faulthandler.dump_traceback_later(getattr(fuzzer, "SECONDS", SECONDS), exit=True)
        started = time.perf_counter()
        try:
            line["outcome"] = fuzzer.case(seed, folder)
        except BaseException:  # noqa: BLE001  whatever a case raises is what the fuzzer looks for
            line["fault"] = traceback.format_exc(limit=-12)[-4000:]
        faulthandler.cancel_dump_traceback_later()
        line["seconds"] = time.perf_counter() - started
        line["peak"] = _bytes_of("VmHWM") - held
        shutil.rmtree(folder, ignore_errors=True)
        out.write(json.dumps(line) + "\n")


def _lines(name: str, first: int, last: int, errors: Any) -> Iterator[dict[str, Any]]:
    command = [sys.executable, "-c", f"from tests.fuzz.harness import work; work({name!r}, {first}, {last})"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
        assert child.stdout is not None
        for text in child.stdout:
            yield json.loads(text)
    yield {"exit": child.returncode}


def run(name: str, first: int, last: int) -> Report:
    """Run the cases first..last-1 of a fuzzer; a child that dies is a fault of its case and is replaced."""
    report = Report(name, cases=last - first)
    started = time.perf_counter()
    seed = first
    while seed < last:
        with tempfile.TemporaryFile("w+") as errors:
            begun = -1
            for line in _lines(name, seed, last, errors):
                begun = line.get("seed", begun)
                if "seconds" in line:
                    seed = begun + 1
                    report.peak_bytes = max(report.peak_bytes, line["peak"])
                    if line["seconds"] > report.slowest_seconds:
                        report.slowest_seconds, report.slowest_seed = round(line["seconds"], 3), begun
                    if "fault" in line:
                        report.faults[begun] = line["fault"]
                    else:
                        report.outcomes[line["outcome"]] += 1
                elif "exit" in line and seed < last:
                    errors.seek(0)
                    report.faults[seed] = f"the child ended with code {line['exit']}:\n{errors.read()[-4000:]}"
                    seed = last if begun < seed else seed + 1  # it did not even start the case: give up
    report.seconds = round(time.perf_counter() - started, 1)
    return report
