"""Segments of an encoded film in a hidden folder beside the result, so that an interrupted film goes on where it was.

A segment is FRAMES frames by an encoder of its own, so that a resumed film has the same bytes as one in one run. Its
file holds the packets as they left the encoder, with exact timestamps in the encoder's time base. `manifest.json` says
what the film is made from and which segments are complete; it is replaced after each one.

The folder `.NAME.HASH-TOKEN.segments` belongs to one run at a time, which holds a lock on it. A folder that no run
holds is taken over if its manifest is equal, else removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FRAMES = 60
SUFFIX = ".segments"
"""Ends the names of work folders, which are never inputs."""

_ATTEMPTS = 3
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # some network file systems
_HEADER = struct.Struct("<qq?II")
_VERSION = 1


@dataclass(frozen=True)
class Record:
    """A complete segment.

    frames: in it; repeated: those that replace another one, of which failed: not finite in the network. anchor: the
    number, from 0 in the film, of the last good frame up to its end; digest: of that frame's upscaled pixels.
    """

    frames: int
    repeated: int
    failed: int
    anchor: int
    digest: str
    bytes: int


@dataclass(frozen=True)
class PacketHead:
    """What precedes a packet's data in a file: its time and duration in the encoder's time base, and sizes in bytes."""

    pts: int
    duration: int
    key: bool
    size: int
    extra: int


def write_packet(file: BinaryIO, head: PacketHead, data: bytes, extra: bytes) -> None:
    """Append a packet. extra: the side data of a Matroska block, which holds alpha."""
    file.write(_HEADER.pack(head.pts, head.duration, head.key, head.size, head.extra) + data + extra)


def digest(pixels: Any) -> str:
    """SHA-256 of an array's bytes, which tells one model and its settings from another."""
    return hashlib.sha256(memoryview(pixels).cast("B")).hexdigest()


def fingerprint(source: Path) -> dict[str, Any]:
    """What identifies an input file without reading it whole."""
    status = os.stat(source)
    with open(source, "rb") as file:
        head = hashlib.sha256(file.read(1 << 20)).hexdigest()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "head": head}


@dataclass
class WorkFolder:
    """The folder of a run, locked. identity: what the segments depend on. records: of complete segments, in order."""

    path: Path
    identity: dict[str, Any]
    lock: BinaryIO
    records: list[Record] = field(default_factory=list)

    @property
    def frames(self) -> int:
        """Frames in complete segments."""
        return sum(record.frames for record in self.records)

    def file(self, number: int) -> Path:
        """The file of a segment."""
        return self.path / f"{number:06}.packets"

    def commit(self, record: Record) -> None:
        """Declare the next segment complete; its file is on the disk."""
        self.records.append(record)
        self._save()

    def restart(self) -> None:
        """Forget all segments."""
        self.records.clear()
        self._save()

    def _save(self) -> None:
        manifest = self.path / "manifest.json"
        text = json.dumps({"identity": self.identity, "segments": [asdict(record) for record in self.records]})
        temporary = manifest.with_suffix(".part")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, manifest)

    def heads(self) -> Iterator[PacketHead]:
        """The heads of all packets in coding order, without their data."""
        for head, file in self._walk():
            file.seek(head.size + head.extra, os.SEEK_CUR)
            yield head

    def packets(self) -> Iterator[tuple[PacketHead, bytes, bytes]]:
        """All packets in coding order: head, data, extra data."""
        for head, file in self._walk():
            yield head, file.read(head.size), file.read(head.extra)

    def _walk(self) -> Iterator[tuple[PacketHead, BinaryIO]]:
        for number in range(len(self.records)):
            with open(self.file(number), "rb") as file:
                while data := file.read(_HEADER.size):
                    yield PacketHead(*_HEADER.unpack(data)), file

    def close(self, *, keep: bool) -> None:
        """Release the folder; without `keep`, or without a complete segment, remove it."""
        remove = not keep or not self.records
        if remove:  # before the lock is released, so that no other run takes it over
            shutil.rmtree(self.path, ignore_errors=True)
        self.lock.close()
        if remove:  # some systems remove no open file
            shutil.rmtree(self.path, ignore_errors=True)


def _lock(folder: Path) -> BinaryIO | None:
    """An open file that is locked until it is closed or the process ends; None if another run holds it."""
    file: BinaryIO | None = None
    try:
        file = open(folder / "lock", "ab")  # noqa: SIM115  held as long as the folder is in use
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if file is not None and error.errno in _NO_LOCKS:
            return file
        if file is not None:
            file.close()
        return None
    return file


def _prefix(target: Path) -> str:
    """Of the folders of a target; the hash tells apart long names, which are cut to fit into the limit of names."""
    name = os.fsencode(target.name)
    start = os.fsdecode(name[:40])
    return f".{start}.{hashlib.sha256(name).hexdigest()[:8]}-"


def _records(path: Path, identity: dict[str, Any]) -> list[Record] | None:
    """The complete segments of a folder; None if it was made from something else, or is damaged."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["identity"] != identity:
            return None
        records = [Record(**record) for record in manifest["segments"]]
        for number, record in enumerate(records):
            if os.stat(path / f"{number:06}.packets").st_size != record.bytes:
                return None
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return records


def claim(target: Path, identity: dict[str, Any]) -> WorkFolder:
    """The folder of an earlier run for the same target and identity, or a new one. Stale ones are removed.

    identity: JSON values. Raises OSError if no folder can be made.
    """
    identity = json.loads(json.dumps({"version": _VERSION, "target": os.fsencode(target.name).hex(), **identity}))
    prefix = _prefix(target)
    chosen: WorkFolder | None = None
    for name in sorted(os.listdir(target.parent)):
        if not (name.startswith(prefix) and name.endswith(SUFFIX)):
            continue
        path = target.parent / name
        lock = _lock(path)
        if lock is None:
            continue
        records = _records(path, identity) if chosen is None else None
        folder = WorkFolder(path, identity, lock, records or [])
        if records:
            chosen = folder
        else:
            folder.close(keep=False)
    if chosen is not None:
        return chosen
    for _ in range(_ATTEMPTS):  # another run may find a new folder before it is locked, and remove it
        path = target.parent / f"{prefix}{secrets.token_hex(4)}{SUFFIX}"
        path.mkdir()
        lock = _lock(path)
        if lock is not None:
            return WorkFolder(path, identity, lock)
    raise OSError(errno.ENOLCK, "cannot lock a file in this folder", str(target.parent))
