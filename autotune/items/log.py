"""The log of all measurements, one JSON line each, appended as they are made; an interrupted run resumes from it.

A line carries a checksum and a stamp: the hash of everything that it depends on (kernel source, search space,
versions, device). Truncated or corrupt lines and those with another stamp are skipped. Processes may append
concurrently.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import zlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]
"""Kind of measurement, item or target, configuration."""


class Log:
    """The measurements so far, by key and stamp; in memory only if there is no path."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._waiting: dict[tuple[Key, str], list[dict[str, Any]]] = defaultdict(list)
        self._read: dict[tuple[Key, str], int] = defaultdict(int)
        if path is not None and path.exists():
            for record in read_records(path):
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
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, b"\n" * torn + line)
    finally:
        os.close(file)  # releases the lock too


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The valid lines of a file, in order."""
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


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
