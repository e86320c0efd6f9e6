"""How long a film's file says it is: the end of its last top-level element. A shorter file is cut off.

Read from the container's own sizes, because FFmpeg takes the end of the file for the end of the film.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

_MAX_ELEMENTS = 100_000
_EBML, _SEGMENT = 0x1A45DFA3, 0x18538067
_ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
_ASF_FILE = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_ASF_BROADCAST = 1


def stated_size(file: BinaryIO) -> int | None:
    """Bytes of the whole file as its elements state them; None if they do not."""
    file.seek(0)
    head = file.read(16)
    if head[:4] == b"RIFF":
        return _riff(file)
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return _matroska(file)
    if head == _ASF_HEADER:
        return _asf(file)
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp"):
        return _boxes(file)
    return None


def _size(file: BinaryIO) -> int:
    return file.seek(0, os.SEEK_END)


def _boxes(file: BinaryIO) -> int | None:
    """ISO base media (ISO/IEC 14496-12, 4.2): a box after another, each with its size first."""
    position, end = 0, _size(file)
    for _ in range(_MAX_ELEMENTS):
        file.seek(position)
        head = file.read(16)
        if position >= end or len(head) < 8:
            return position
        size, start = struct.unpack(">I", head[:4])[0], 8
        if size == 1 and len(head) == 16:
            size, start = struct.unpack(">Q", head[8:])[0], 16
        if size == 0 or not head[4:8].isascii():  # up to the end of the file, or not a box: padding after the last one
            return end
        if size < start:
            return None
        position += size
    return None


def _riff(file: BinaryIO) -> int | None:
    """AVI and its OpenDML extension: one RIFF chunk or several, each with its size (little endian)."""
    position, end = 0, _size(file)
    for _ in range(_MAX_ELEMENTS):
        file.seek(position)
        head = file.read(8)
        if position >= end or head[:4] != b"RIFF" or len(head) < 8:
            return position - 8 if position == end + 8 else position  # some programs count the chunk's own head too
        size = struct.unpack("<I", head[4:])[0]
        if size in (0, 0xFFFFFFFF):
            return None
        position += 8 + size + size % 2
    return None


def _number(file: BinaryIO, keep_marker: bool) -> tuple[int, bool]:
    """An EBML number (RFC 8794, 4): its value, and whether it is the reserved one for unknown. -1: none."""
    first = file.read(1)
    if not first or not first[0]:
        return -1, False
    length = 9 - first[0].bit_length()
    data = first + file.read(length - 1)
    if len(data) < length:
        return -1, False
    value = int.from_bytes(data, "big")
    bits = 7 * length
    plain = value & ((1 << bits) - 1)
    return (value if keep_marker else plain), plain == (1 << bits) - 1


def _matroska(file: BinaryIO) -> int | None:
    """Matroska: an EBML header, then a segment with its size."""
    file.seek(0)
    for _ in range(3):
        identity, _unknown = _number(file, True)
        size, unknown = _number(file, False)
        if identity < 0 or size < 0 or unknown:
            return None
        position = file.tell() + size
        if identity == _SEGMENT:
            return position
        if position > _size(file):
            return position if identity == _EBML else None
        file.seek(position)
    return None


def _asf(file: BinaryIO) -> int | None:
    """ASF (3.2): the file properties in the header hold the size of the file, unless it was broadcast."""
    file.seek(16)
    count = struct.unpack("<QI", file.read(12).ljust(12, b"\0"))[1]
    position = 30
    for _ in range(min(count, 100)):
        file.seek(position)
        head = file.read(104)
        if len(head) < 92:
            return None
        if head[:16] == _ASF_FILE:
            size, flags = struct.unpack("<Q", head[40:48])[0], struct.unpack("<I", head[88:92])[0]
            return size if size and not flags & _ASF_BROADCAST else None
        position += max(24, struct.unpack("<Q", head[16:24])[0])
    return None
