"""The log of all measurements, one JSON line each, appended as they are made; an interrupted run resumes from it.

A line carries a checksum and a stamp: the hash of everything that it depends on (kernel source, search space,
versions, device). Truncated or corrupt lines, those with another stamp and those that are no measurement are skipped.
Processes may append concurrently.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from tinysr_kernels.launch.json_file import BadFile, open_regular

Key = tuple[str, str, str]
"""Kind of measurement, item or target, configuration."""
LONGEST = 1 << 20
"""Bytes of a line; those of a run have a few hundred."""
LARGEST = 1 << 28
"""Bytes of a file, which is read whole."""
LOCK_SECONDS = 60.0
MOST = 1e12
"""Of any number: eleven days in microseconds."""


class Log:
    """The measurements so far, by key and stamp; in memory only if there is no path."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._waiting: dict[tuple[Key, str], list[dict[str, Any]]] = defaultdict(list)
        self._read: dict[tuple[Key, str], int] = defaultdict(int)
        if path is not None and path.exists():
            for record in filter(is_measurement, read_records(path)):
                self._waiting[_key(record), record["stamp"]].append(record)

    def next(self, key: Key, stamp: str) -> dict[str, Any] | None:
        """The next measurement of this key from an earlier run, or None. Each is returned once."""
        known = self._waiting.get((key, stamp), [])
        place = self._read[key, stamp]
        if place >= len(known):
            return None
        self._read[key, stamp] += 1
        return known[place]

    def add(self, key: Key, stamp: str, **values: Any) -> dict[str, Any]:
        """Append a measurement and return its record."""
        what, subject, config = key
        record = {"what": what, "subject": subject, "config": config, "stamp": stamp, **values}
        if self.path is not None:
            append(self.path, record)
        return record


def append(path: Path, record: dict[str, Any]) -> None:
    """Append one line atomically, after terminating a line that a killed process left unfinished."""
    line = _line(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)
        try:
            os.write(file, b"\n" * _is_torn(file) + line)
        finally:
            os.close(file)


def _is_torn(file: int) -> bool:
    """Whether the file's last line has no end."""
    if os.fstat(file).st_size == 0:
        return False
    os.lseek(file, -1, os.SEEK_END)
    return os.read(file, 1) != b"\n"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The valid lines of a file, in order. OSError if it cannot be read, BadFile if it is no file, or too large."""
    try:
        file = open_regular(path)
    except BadFile as error:
        raise BadFile(f"{path} {error}; move it away") from None
    with file:
        if os.fstat(file.fileno()).st_size > LARGEST:
            raise BadFile(f"{path} has more than {LARGEST >> 20} MiB; delete it to start anew")
        while line := file.readline(LONGEST):
            record = _parse(line)
            if record is not None:
                yield record


def is_measurement(record: dict[str, Any]) -> bool:
    """Whether a record has what the search reads of one of its kind, in the right types."""
    if not _is_number(record.get("seconds")):
        return False
    if record["what"] == "build":
        return _are(record.get("resources"), _is_usage) and _are(record.get("faults"), _is_text)
    if "failure" in record:
        failure = record["failure"]
        return _are(failure, _is_text) and len(failure) == 2
    if record["what"].startswith("check "):
        return True
    samples = [[record.get(name) for name in ("us", "clock", "disturbed")]]
    return _are(record.get("retried"), _is_sample) and all(map(_is_sample, samples))


def _are(values: object, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(map(is_one, values))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < MOST


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_usage(value: object) -> bool:
    return _are(value, _is_number) and len(value) == 2  # type: ignore[arg-type]


def _is_sample(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return False
    us, clock, disturbed = value
    return _is_number(us) and us > 0 and _is_number(clock) and _is_text(disturbed)


def _line(record: dict[str, Any]) -> bytes:
    text = json.dumps(record, sort_keys=True)
    return f"{zlib.crc32(text.encode()):08x} {text}\n".encode()


def _parse(line: bytes) -> dict[str, Any] | None:
    with contextlib.suppress(ValueError, RecursionError):
        check, _, text = line.rstrip(b"\n").partition(b" ")
        if len(check) == 8 and int(check, 16) == zlib.crc32(text):
            record = json.loads(text)
            if isinstance(record, dict) and all(isinstance(record.get(k), str) for k in (*_KEY, "stamp")):
                return record
    return None


_KEY = ("what", "subject", "config")


def _key(record: dict[str, Any]) -> Key:
    return record["what"], record["subject"], record["config"]
