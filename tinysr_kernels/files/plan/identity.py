"""Whether two paths lead to one file, through links, `..`, hard links and on file systems that ignore case."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from tinysr_kernels.errors import InputError


def entry(path: str | os.PathLike[str]) -> str:
    """The directory entry that a path names: its real folder and its name. A link and its target are two entries."""
    folder, name = os.path.split(os.fspath(path))
    return os.path.normcase(os.path.join(os.path.realpath(folder or os.curdir), name))


def identities(path: str | os.PathLike[str], *, follow_link: bool = True) -> frozenset[object]:
    """Keys of the file that a path leads to, now or when missing folders are made; paths with a common key are one.

    `new/../a.png` is no file while new/ is missing and becomes `a.png` with it: the path counts as it is written, too.
    follow_link: whether a symbolic link stands for the file it leads to as well.
    """
    lexical = os.path.abspath(path)
    keys: set[object] = {os.path.normcase(lexical), entry(path)}
    if follow_link:
        keys.add(os.path.normcase(os.path.realpath(path)))
    for each in {os.fspath(path), lexical}:
        try:
            status = os.stat(each, follow_symlinks=follow_link)
        except OSError:
            continue
        if status.st_ino and not stat.S_ISLNK(status.st_mode):
            keys.add((status.st_dev, status.st_ino))
    return frozenset(keys)


def same_file(first: str | os.PathLike[str], second: str | os.PathLike[str]) -> bool:
    """Whether two paths lead to one file."""
    return not identities(first).isdisjoint(identities(second))


class Originals:
    """The files that a run reads. None of them is ever replaced."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._keys: set[object] = set()
        for path in paths:
            self._keys |= identities(path)

    def hold(self, path: Path, *, follow_link: bool) -> bool:
        """Whether writing the path, as things are now, would replace one of them."""
        return not self._keys.isdisjoint(identities(path, follow_link=follow_link))

    def check(self, path: Path, *, follow_link: bool) -> None:
        """Raise InputError if writing the path would replace one of them."""
        if self.hold(path, follow_link=follow_link):
            raise InputError(f"{path} is an input and is never overwritten; choose another output")
