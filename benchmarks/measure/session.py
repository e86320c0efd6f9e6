"""Common parts of measuring commands: device, time limit, records and errors."""

from __future__ import annotations

import argparse
import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measure.results import Record, Sink, device_name
from benchmarks.measure.timing import BelowFloor, Stopwatch


class Late(RuntimeError):
    """No time is left for a measurement."""


@dataclass
class Session:
    """One run of a command. until: time.monotonic at which it should end. cut: whether measurements were skipped."""

    device: torch.device
    stopwatch: Stopwatch
    sink: Sink
    until: float
    cut: bool = False

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU; if not, sizes are reduced."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds that are left."""
        return self.until - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raise Late unless this many seconds are left."""
        if self.left() < seconds:
            raise Late(f"no time left, {seconds:.0f} s are needed")

    @contextlib.contextmanager
    def guarded(self, key: str, labels: Mapping[str, str]) -> Iterator[None]:
        """Within this context an error becomes a record, and the next measurement continues.

        `BelowFloor` is raised: it ends the command.
        """
        try:
            yield
        except BelowFloor:
            raise
        except (Late, subprocess.TimeoutExpired) as error:
            self.cut = True
            self._failed(key, labels, error)
        except Exception as error:  # noqa: BLE001  one failure must not lose the other measurements, whatever it is
            self._failed(key, labels, error)

    def _failed(self, key: str, labels: Mapping[str, str], error: Exception) -> None:
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:400]
        self.sink.add(Record(key, dict(labels), error=text))
        print(f"{key}: {text}", file=sys.stderr)
        self.release()

    def release(self) -> None:
        """Free cached device memory of earlier measurements."""
        if self.cuda:
            torch.cuda.empty_cache()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every measuring command."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample there; resumes an existing file")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="S", help="time limit in seconds")
    parser.add_argument("--cpu", action="store_true", help="on the CPU, in reduced sizes, although there is a GPU")


@contextlib.contextmanager
def session(command: str, options: argparse.Namespace) -> Iterator[Session]:
    """A session whose file is complete unless something raised or time ran out; BelowFloor is noted and raised."""
    cuda = torch.cuda.is_available() and not options.cpu
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    sink = Sink(command, device_name(device), not cuda, options.json)
    made = Session(device, Stopwatch(device), sink, time.monotonic() + options.budget)
    if not cuda:
        print(
            f"{command}: no GPU is used: reduced sizes on the CPU; the results say nothing about a GPU", file=sys.stderr
        )
    try:
        yield made
    except BelowFloor as error:
        sink.note(f"aborted: {error}")
        raise
    except KeyboardInterrupt:
        sink.note("interrupted")
        raise
    sink.finish(complete=not made.cut)
