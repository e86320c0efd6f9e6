"""Expand a glob as a shell does, without following links in `**`: two links in a cycle would be 2^40 folders.

Python's glob follows them. Otherwise the rules are its own: `*`, `?`, `[...]` and `**`; hidden entries match only a
part that begins with a dot; what cannot be listed has no entries.
"""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Iterator
from pathlib import Path

_ANY_DEPTH = "**"


def has_magic(text: str) -> bool:
    """Whether a name contains a wildcard."""
    return glob.has_magic(text)


def fixed_part(pattern: str) -> Path:
    """The folder above the first wildcard; the working directory if there is none."""
    parts = Path(pattern).parts
    first = next(index for index, part in enumerate(parts) if has_magic(part))
    return Path(*parts[:first])


def expand(pattern: str) -> Iterator[Path]:
    """The existing paths that match, folders included, sorted in each folder. One may come more than once."""
    parts: list[str] = []
    for part in Path(pattern).parts[len(fixed_part(pattern).parts) :]:
        if part != _ANY_DEPTH or parts[-1:] != [_ANY_DEPTH]:
            parts.append(part)
    return _expand(fixed_part(pattern), parts)


def _entries(folder: Path, hidden: bool) -> list[tuple[str, bool]]:
    """Names in a folder, and whether each is a folder and no link."""
    try:
        with os.scandir(folder) as listing:
            found = [(each.name, each.is_dir(follow_symlinks=False)) for each in listing]
    except OSError:
        return []
    return sorted(each for each in found if hidden or not each[0].startswith("."))


def _expand(folder: Path, parts: list[str]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == _ANY_DEPTH:
        yield from _expand(folder, rest)
        for name, is_folder in _entries(folder, hidden=False):
            if is_folder:
                yield from _expand(folder / name, parts)
            elif not rest:
                yield folder / name
    elif has_magic(part):
        names = [name for name, _ in _entries(folder, hidden=part.startswith("."))]
        for name in fnmatch.filter(names, part):
            yield from _expand(folder / name, rest)
    elif os.path.lexists(folder / part):
        yield from _expand(folder / part, rest)
