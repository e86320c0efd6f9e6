"""What a folder of results was made of, so that a run with other inputs does not continue or reuse it.

A folder gets a file `made-of.json`: settings as they are, files and folders as fingerprints.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SAMPLES, SAMPLE = 16, 1 << 16


def fingerprint(path: Path) -> str:
    """Of a file: its size and sixteen samples of 64 KiB. Of a folder: names and fingerprints of all files in it.

    The place does not matter. ValueError if there is no such file or folder, or it cannot be read.
    """
    try:
        if not path.is_dir():
            return _of_file(path)
        names = sorted(one for one in path.rglob("*") if one.is_file())
        content = "".join(f"{one.relative_to(path).as_posix()} {_of_file(one)}\n" for one in names)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from error
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def names_and_sizes(folder: Path) -> str:
    """Of a folder of many large files: their names and sizes."""
    files = sorted(one for one in folder.rglob("*") if one.is_file())
    content = "".join(f"{one.relative_to(folder).as_posix()} {one.stat().st_size}\n" for one in files)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _of_file(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(SAMPLES):
            file.seek(i * max(size - SAMPLE, 0) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]


def claim(folder: Path, inputs: Mapping[str, Any], *, write: bool = True) -> None:
    """Write what the folder is made of, unless it says so already; ValueError if it says something else.

    write: whether this process writes; the others only compare.
    """
    path = folder / "made-of.json"
    own = json.loads(json.dumps(dict(inputs)))
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: damaged; remove the folder, or restore the file") from error
        changed = sorted(name for name in {*there, *own} if there.get(name) != own.get(name))
        if changed:
            raise ValueError(f"{folder} was made of another {', another '.join(changed)}; remove it, or restore that")
    elif write:
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, path)
