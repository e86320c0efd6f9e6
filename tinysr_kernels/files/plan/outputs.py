"""Name the results in an output folder. Names follow from the inputs alone, not from what the folder holds.

Each result keeps its input's name, with subfolders mirrored. It keeps the input's format (that of its suffix, else that
of its content) if that can be written, else it is PNG; films become Matroska. A suffix that is no image's or film's is
part of the name (IMG.2024 -> IMG.2024.jpg). If several results would share a name, each gets its old suffix appended
to the stem (a.jpg and a.png -> a_jpg.png and a_png.png), and remaining duplicates are numbered. Names that get too long
for the file system are cut.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tinysr_kernels.files.encode import writable
from tinysr_kernels.files.plan.inputs import Input
from tinysr_kernels.files.plan.recognize import DOCUMENT_SUFFIXES, claims_to_be
from tinysr_kernels.files.video import VIDEO_SUFFIXES

MAX_NAME_BYTES = 255  # of ext4, NTFS, APFS and most others


def name_key(path: Path) -> str:
    """Equal for names that are one on file systems that ignore case."""
    return str(path).casefold()


def fit(path: Path) -> Path:
    """The path with its last name cut to what a file system can hold, in whole characters; the suffix stays."""
    name = path.name
    if len(os.fsencode(name)) <= MAX_NAME_BYTES:
        return path
    stem, suffix = os.path.splitext(name)
    room = MAX_NAME_BYTES - len(os.fsencode(suffix))
    while len(os.fsencode(stem)) > room:
        stem = stem[:-1]
    return path.with_name(stem + suffix)


def with_stem_end(path: Path, end: str) -> Path:
    """a.png -> a_2.png for the end "_2", which stays where the name is cut."""
    stem = path.stem
    while len(os.fsencode(stem + end + path.suffix)) > MAX_NAME_BYTES:
        stem = stem[:-1]
    return path.with_name(stem + end + path.suffix)


def numbered(path: Path) -> Iterator[Path]:
    """a.png, a_2.png, a_3.png, ..."""
    yield path
    number = 2
    while True:
        yield with_stem_end(path, f"_{number}")
        number += 1


def _base(item: Input) -> tuple[Path, str]:
    """The relative path without the suffix, and the suffix; a suffix of no known kind is part of the name."""
    path = item.relative
    if claims_to_be(path) is None and path.suffix.lower() not in DOCUMENT_SUFFIXES:
        return path, ""
    return path.with_name(path.stem), path.suffix


def _suffix(item: Input, wanted: str | None) -> str:
    own = item.source.suffix
    if item.video:
        return own if own.lower() in VIDEO_SUFFIXES else ".mkv"
    if wanted:
        return wanted
    if writable(own):
        return own
    return item.suffix if item.suffix and writable(item.suffix) else ".png"


def _unique(path: Path, taken: set[str]) -> Path:
    name = next(name for name in numbered(path) if name_key(name) not in taken)
    taken.add(name_key(name))
    return name


def _with_old_suffix(item: Input, suffix: str) -> Path:
    base, old = _base(item)
    end = f"_{old[1:]}" if old else ""
    return with_stem_end(base.with_name(base.name + suffix), end)


def name_beside(items: Sequence[Input], end: str, wanted: str | None) -> list[Path]:
    """Where each input's result goes beside it: photo.jpg -> photo_x4.jpg for the end "_x4".

    A name that is taken gets a number. wanted: the suffix of all images.
    """
    taken: set[str] = set()
    named = []
    for item in items:
        base, _ = _base(item)
        path = with_stem_end(item.source.with_name(base.name + _suffix(item, wanted)), end)
        free = (name for name in numbered(path) if not os.path.lexists(name) and name_key(name) not in taken)
        named.append(next(free))
        taken.add(name_key(named[-1]))
    return named


def name_outputs(items: Sequence[Input], wanted: str | None) -> list[tuple[Path, Path]]:
    """Output and fallback of each input, below the output folder. wanted: the suffix of all images.

    The fallback is the PNG to write if the output's format cannot store the result; equal to the output for PNG and
    films.
    """
    plain = []
    for item in items:
        base, _ = _base(item)
        plain.append(fit(base.with_name(base.name + _suffix(item, wanted))))
    shared = Counter(map(name_key, plain))
    taken: set[str] = set()
    outputs: dict[int, Path] = {}
    for unshared in (True, False):  # unshared names first, so that the order of the inputs does not change them
        for index, (item, path) in enumerate(zip(items, plain, strict=True)):
            if (shared[name_key(path)] == 1) == unshared:
                outputs[index] = _unique(path if unshared else _with_old_suffix(item, path.suffix), taken)
    named = []
    for index, item in enumerate(items):
        output = fallback = outputs[index]
        if not item.video and output.suffix.lower() != ".png":
            fallback = output.with_suffix(".png")
            fallback = _unique(_with_old_suffix(item, ".png") if name_key(fallback) in taken else fallback, taken)
        named.append((output, fallback))
    return named
