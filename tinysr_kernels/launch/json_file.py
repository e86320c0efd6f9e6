"""Reads JSON files that others may have written: bounded in size and depth, strict, and never waiting for a writer."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO


class BadFile(ValueError):
    """A file is not what it should be. The message continues a sentence that begins with its name."""


DEPTH = 32
"""Tables and lists inside each other; this project's own files have six."""


def read_json(path: Path, largest: int) -> Any:
    """The value in a regular file of at most `largest` bytes, links followed.

    OSError if it cannot be read; BadFile if it is anything else, is not UTF-8, or is no JSON: RFC 8259, and neither
    names that occur twice, of which readers keep different ones, nor more than DEPTH levels. Numbers too large for a
    float are infinite, as in `json`.
    """
    with open_regular(path) as file:
        raw = file.read(largest + 1)
    if len(raw) > largest:
        raise BadFile(f"has more than {largest >> 20} MiB")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_refuse, object_pairs_hook=_table)
    except RecursionError:
        raise BadFile(f"is not JSON: nested deeper than {DEPTH} levels") from None
    except ValueError as error:
        raise BadFile(f"is not JSON: {error}") from error
    _check_depth(value)
    return value


def open_regular(path: Path) -> BinaryIO:
    """A regular file, links followed, opened for reading. OSError if that fails, BadFile for anything else."""
    # Without O_NONBLOCK, opening a FIFO waits for its writer. What was opened is examined, not what has the name now.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile("is no regular file")
    return open(descriptor, "rb")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"{twice[:60]!r} occurs twice")
    return table


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEPTH + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        if not inner:
            return
        level = [one for some in inner for one in some]
    raise BadFile(f"is not JSON: nested deeper than {DEPTH} levels")
