"""Which result was made from which input: a small hidden file in each output folder, one line of JSON per result.

It is what `--skip-existing` goes by, and how a run tells its earlier results from inputs and from other people's files.
A result is known by its name and size, so that the folder may be moved or copied; an input by its content, which is
read again only if its name, size, time of change or inode is another. The line is written before the result gets its
final name: a line without a file, or with a file of another size, says nothing.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinysr_kernels.atomic import lock, replacing

FILE_NAME = ".tinysr-results"
_HEADER = b'{"tinysr_results": 1}\n'
_MAX_BYTES = 64 << 20  # a quarter of a million results
_SPARE_LINES = 1000  # superseded lines before the file is written anew


@dataclass(frozen=True)
class Source:
    """An input as it was read. size: in bytes. mtime_ns: in nanoseconds. blake2b: of the content, 16 bytes as hex."""

    name: str
    size: int
    mtime_ns: int
    inode: int
    blake2b: str

    def is_at(self, path: Path) -> bool:
        """Whether the file at a path is this input, unchanged. Reads it if its name or status leaves that open."""
        try:
            status = os.stat(path)
            if status.st_size != self.size:
                return False
            unmoved = (path.name, status.st_mtime_ns, status.st_ino) == (self.name, self.mtime_ns, self.inode)
            return unmoved or _digest(path) == self.blake2b
        except OSError:
            return False


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def source_of(path: Path) -> Source:
    """Describe an input. Reads the file; raises OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a FIFO that has taken the file's place would block
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return Source(path.name, status.st_size, status.st_mtime_ns, status.st_ino, _digest(path))


@dataclass(frozen=True)
class Record:
    """One line. result: the name in the folder. size: in bytes."""

    result: str
    size: int
    source: Source

    def line(self) -> bytes:
        """The record as a line of ASCII; names that are not UTF-8 as escaped surrogates."""
        return json.dumps(asdict(self)).encode() + b"\n"


def _record(line: bytes) -> Record | None:
    try:
        read: Any = json.loads(line)
        source = Source(**read["source"])
        record = Record(read["result"], read["size"], source)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    texts = (record.result, source.name, source.blake2b)
    numbers = (record.size, source.size, source.mtime_ns, source.inode)
    return record if all(type(t) is str for t in texts) and all(type(n) is int for n in numbers) else None


@contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """Open the file of records, never through a link, and lock it. Raises OSError for what is no file of records."""
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            lock(descriptor, wait=True)
            if not os.path.samestat(status, os.stat(path, follow_symlinks=False)):
                continue  # another run has just written it anew
            head = os.read(descriptor, len(_HEADER))
            if not _HEADER.startswith(head):
                raise OSError(errno.EEXIST, "a file of another kind", str(path))
            yield descriptor
            return
        finally:
            os.close(descriptor)


class _Folder:
    """The records of one folder, as far as they have been read; other runs may append and write the file anew."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self.last: dict[str, Record] = {}
        self.lines = 0
        self._inode = self._offset = -1

    def refresh(self) -> None:
        """Read what has been appended since the last time. A file that cannot be read holds no records."""
        try:
            status = os.lstat(self.path)
            if (status.st_ino, status.st_size) == (self._inode, self._offset) or status.st_size > _MAX_BYTES:
                return
            with _locked(self.path, os.O_RDONLY) as descriptor, open(descriptor, "rb", closefd=False) as file:
                inode = os.fstat(descriptor).st_ino
                if inode != self._inode:
                    self.last, self.lines, self._inode, self._offset = {}, 0, inode, 0
                file.seek(self._offset)
                lines = file.read(_MAX_BYTES).split(b"\n")
                self._offset = file.tell()
        except OSError:
            return
        self.lines += len(lines)
        self.last.update((record.result, record) for record in map(_record, lines) if record is not None)


class Records:
    """The records of all folders that a run looks at. Safe for several threads and several runs."""

    def __init__(self) -> None:
        self._folders: dict[str, _Folder] = {}
        self._lock = threading.Lock()

    def _of(self, path: Path) -> Record | None:
        key = os.path.abspath(path.parent)
        with self._lock:
            known = self._folders.get(key)
            if known is None:
                known = self._folders[key] = _Folder(path.parent)
                known.refresh()
                if known.lines > 2 * len(known.last) + _SPARE_LINES:
                    _compact(path.parent)
            known.refresh()
            return known.last.get(path.name)

    def of_result(self, path: Path) -> Record | None:
        """The record of the file at a path; None if there is no such file, or not the one that was written."""
        record = self._of(path)
        try:
            return record if record is not None and os.lstat(path).st_size == record.size else None
        except OSError:
            return None

    def made_from(self, path: Path, source: Path) -> bool:
        """Whether the file at a path is the result of this input as it is now."""
        record = self.of_result(path)
        return record is not None and record.source.is_at(source)

    def add(self, path: Path, size: int, source: Source) -> None:
        """Record that a result of `size` bytes at `path` is made from the input. Raises OSError."""
        record = Record(path.name, size, source)
        with _locked(path.parent / FILE_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND) as descriptor:
            end = os.lseek(descriptor, 0, os.SEEK_END)
            if end < len(_HEADER):  # torn off by a full disk
                os.ftruncate(descriptor, 0)
                end = 0
            os.lseek(descriptor, max(end - 1, 0), os.SEEK_SET)
            torn = end and os.read(descriptor, 1) != b"\n"  # by a full disk or a lost machine
            os.write(descriptor, (_HEADER if not end else b"\n" if torn else b"") + record.line())


def _compact(folder: Path) -> None:
    """Write the file anew without superseded lines and lines of results that are gone."""
    path = folder / FILE_NAME
    try:
        with _locked(path, os.O_RDWR), replacing(path, follow_link=False) as temporary:
            with open(path, "rb") as file:  # whole: what is left out is lost
                found = {record.result: record for record in map(_record, file) if record is not None}
            kept = (record.line() for record in found.values() if os.path.lexists(folder / record.result))
            temporary.write_bytes(_HEADER + b"".join(kept))
    except OSError:
        return
