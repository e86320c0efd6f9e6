"""Files and JSON texts, opened with care: every failure is a CheckpointError that names the file."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError

JSON_LIMIT = 64 * 2**20


def regular_file(path: Path) -> int:
    """The size in bytes of a regular, non-empty file.

    Raises CheckpointError for a folder, a device or pipe (reading one may never end), a missing, empty or unreachable
    file.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path}: expected a file, found a folder")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a regular file, found a device, pipe or socket")
    if status.st_size == 0:
        raise CheckpointError(f"{path}: expected a checkpoint, found an empty file; fetch it again")
    return status.st_size


def read_bytes(path: Path, offset: int, count: int) -> bytes:
    """`count` bytes from `offset`; CheckpointError when they cannot be read or the file ends before."""
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            found = file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if len(found) != count:
        raise CheckpointError(f"{path}: expected {count} bytes at {offset}, found {len(found)}: truncated")
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {quoted(twice)} occurs twice")
    return values


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys; CheckpointError for anything else, too deep a nesting included."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: expected valid JSON, found: {quoted(str(error))}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 64 MiB; CheckpointError otherwise."""
    size = regular_file(path)
    if size > JSON_LIMIT:
        raise CheckpointError(f"{path}: expected at most {JSON_LIMIT} bytes of JSON, found {size}")
    return parse_json(read_bytes(path, 0, size), str(path))
