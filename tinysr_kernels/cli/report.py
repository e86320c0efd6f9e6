"""The report of `tinysr upscale`: lines of JSON, appended run after run.

The first line of a run has the key `run` (version, time, arguments, model), the last one `summary` (counts by status,
files left alone by reason); a line with `input` is a result, see files/batch.py. All of it is ASCII.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinysr_kernels._version import __version__
from tinysr_kernels.cli.terminal import say, write
from tinysr_kernels.errors import InputError

if TYPE_CHECKING:
    from tinysr_kernels.files.batch import Result
    from tinysr_kernels.files.jobs import Plan

STDOUT = "-"
_KEYS = ("run", "summary", "input")
_FIRST_LINE = 1 << 20


class Report:
    """Where the lines of a run go. One that cannot be written is lost, which is said once; nothing is raised for it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._failed = False
        self._descriptor = None if path == STDOUT else _open(path)

    def write(self, text: str, /) -> None:
        """Append whole lines at once, so that runs with one report do not mix theirs."""
        problem: object = None
        if self._descriptor is None:
            problem = None if write(sys.stdout, text) else "stdout"
        else:
            try:
                data = text.encode("ascii", "backslashreplace")
                if os.write(self._descriptor, data) < len(data):
                    problem = "the disk is full"
            except OSError as error:
                problem = error.strerror or error
        if problem is not None and not self._failed:
            self._failed = True
            say(f"tinysr: the report {self.path} is incomplete, the run goes on: {problem}")

    def flush(self) -> None:
        """Lines are not held back."""

    def begin(self, arguments: Sequence[str], model: str) -> None:
        """Write the line that begins a run."""
        started = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"version": __version__, "started": started, "arguments": list(arguments), "model": model}
        self._line({"run": line})

    def end(self, results: Iterable[Result], plan: Plan) -> None:
        """Write the line that ends a run."""
        self._line({"summary": {**Counter(result.status for result in results), "ignored": dict(plan.ignored)}})

    def _line(self, value: dict[str, Any]) -> None:
        self.write(json.dumps(value) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _open(path: str) -> int:
    """Open a report to append to. Raises InputError for a file that is neither empty nor a report."""
    try:
        if os.path.lexists(path) and stat.S_ISFIFO(os.stat(path).st_mode):
            raise InputError(f"the report {path} is no regular file; --report - writes to stdout")
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags, 0o666)
    except (OSError, ValueError) as error:
        raise InputError(f"the report {path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    try:
        _check(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(descriptor: int, path: str) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISCHR(mode):  # the null device, a terminal
        return
    if not stat.S_ISREG(mode):
        raise InputError(f"the report {path} is no regular file; --report - writes to stdout")
    first = os.read(descriptor, _FIRST_LINE)
    if not first:
        return
    try:
        line = json.loads(first.split(b"\n", 1)[0])
    except (ValueError, RecursionError):
        line = None
    if not isinstance(line, dict) or not any(key in line for key in _KEYS):
        raise InputError(f"{path} exists and is no report; nothing is appended to it, choose another name")
    os.lseek(descriptor, -1, os.SEEK_END)
    if os.read(descriptor, 1) != b"\n":  # the last run died while it wrote
        os.write(descriptor, b"\n")


def open_report(path: str, plan: Plan) -> Report:
    """Open the report of a run. Raises InputError if it cannot be written or is a file that the run reads or writes."""
    from tinysr_kernels.files.plan.identity import identities
    from tinysr_kernels.files.plan.recognize import claims_to_be

    if path != STDOUT:
        if not path or "\0" in path:
            raise InputError(f"{path!r} is no name of a report")
        if claims_to_be(Path(path)) is not None:
            raise InputError(f"the report {path} has the name of an image or film; name it report.jsonl")
        own = identities(path)
        if plan.originals.hold(Path(path), follow_link=True):
            raise InputError(f"the report {path} is one of the inputs; choose another name")
        if any(job.output is not None and not own.isdisjoint(identities(job.output)) for job in plan):
            raise InputError(f"the report {path} is one of the results; choose another name")
    return Report(path)
