"""The structure of image files, read without decoding pixels: scans, chunks, frames, directories.

Every function reads a seekable binary stream in time linear in the file's size, whatever the file states, and ends at
the first part that makes no sense: what is damaged is for the decoder to report.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

_JPEG_NEXT = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]", re.DOTALL)  # neither stuffed zero, fill, TEM nor restart
_SOF = frozenset([0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xF7])
_TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # bytes per value, by type
_TIFF_CODES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_TIFF_VALUES = 64  # the tags asked for hold few values; longer ones are cut
MAX_DIRECTORIES = 10_000
_MAX_TAGS = 4096
_SMALL = 1 << 16
_JP2_HEADER = 1 << 20  # bytes in which the codestream begins; a profile may precede it
_CONTENT_LIMIT = 1 << 28


def read_at(stream: BinaryIO, offset: int, count: int) -> bytes:
    """Up to count bytes from offset. Python allocates what is asked for, so that no more than there is may be asked."""
    if count > _SMALL:
        count = max(0, min(count, stream.seek(0, io.SEEK_END) - offset))
    stream.seek(offset)
    return stream.read(count)


def contents(stream: BinaryIO) -> bytes:
    """The file up to _CONTENT_LIMIT, for searching. Not mapped: a file cut by another program would end the process."""
    return read_at(stream, 0, _CONTENT_LIMIT)


@dataclass
class Jpeg:
    """The first image of a JPEG file. frame_type: the SOF marker, 0xC0 baseline, 0xC2 progressive, 0 none.

    scans: their number. precision: bits per sample. complete: whether the end marker is there.
    """

    frame_type: int = 0
    precision: int = 8
    width: int = 0
    height: int = 0
    components: int = 0
    scans: int = 0
    complete: bool = False


def jpeg(stream: BinaryIO) -> Jpeg:
    """Walk the markers of a JPEG file (ITU T.81, B.1) up to the end of its first image."""
    data = contents(stream)
    found = Jpeg()
    position = 2
    while match := _JPEG_NEXT.search(data, position):
        marker, position = data[match.start() + 1], match.end()
        if marker == 0xD9:
            found.complete = True
            break
        if marker == 0xD8 or position + 2 > len(data):
            continue
        length = int.from_bytes(data[position : position + 2], "big")
        body = data[position + 2 : position + 2 + min(max(length - 2, 0), 6)]
        if marker in _SOF and len(body) == 6 and not found.frame_type:
            found.frame_type = marker
            found.precision, found.height, found.width, found.components = struct.unpack(">BHHB", body)
        found.scans += marker == 0xDA
        position += max(length, 2)
    return found


@dataclass(frozen=True)
class Jpeg2000:
    """The image area and the largest bits per sample of a JPEG 2000 codestream."""

    width: int
    height: int
    depth: int


def jpeg2000(stream: BinaryIO) -> Jpeg2000 | None:
    """The codestream's SIZ marker (ISO 15444-1, A.5.1), also within a JP2 file; None if it is not found."""
    data = read_at(stream, 0, _JP2_HEADER)
    start = data.find(b"\xff\x4f\xff\x51")
    if start < 0 or len(data) < start + 42:
        return None
    right, bottom, left, top = struct.unpack(">4I", data[start + 8 : start + 24])
    components = int.from_bytes(data[start + 40 : start + 42], "big")
    depths = data[start + 42 : start + 42 + 3 * components : 3]
    depth = max(((bits & 0x7F) + 1 for bits in depths), default=8)
    return Jpeg2000(max(right - left, 0), max(bottom - top, 0), depth)


def png_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset of the data and length of each chunk of a PNG file, also of one that goes beyond its end."""
    position = 8
    while len(head := read_at(stream, position, 8)) == 8:
        length, name = struct.unpack(">I4s", head)
        yield name, position + 8, length
        position += 12 + length
        if name == b"IEND":
            break


def riff_chunks(stream: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Name, offset of the data and length of each chunk of a RIFF file such as WebP."""
    position = 12
    while len(head := read_at(stream, position, 8)) == 8:
        name, length = struct.unpack("<4sI", head)
        yield name, position + 8, length
        position += 8 + length + length % 2


def gif_frames(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Right and bottom edge of each frame of a GIF file (GIF89a, 20); the decoder enlarges its canvas to them."""
    data = contents(stream)
    position = 13 + _color_table(data[10] if len(data) > 10 else 0)
    while position < len(data):
        kind = data[position]
        if kind == 0x21:
            position += 2
        elif kind == 0x2C and position + 10 <= len(data):
            left, top, width, height, flags = struct.unpack("<4HB", data[position + 1 : position + 10])
            yield left + width, top + height
            position += 11 + _color_table(flags)
        else:  # the trailer, or a byte between blocks, which decoders skip
            position += 1
            continue
        while position < len(data) and data[position]:
            position += 1 + data[position]
        position += 1


def _color_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def icon_sizes(stream: BinaryIO) -> Iterator[tuple[int, int]]:
    """Width and height of each image in an ICO file, as its own header states them, not the icon's directory."""
    count = int.from_bytes(read_at(stream, 4, 2), "little")
    for index in range(count):
        entry = read_at(stream, 6 + 16 * index, 16)
        if len(entry) < 16:
            break
        head = read_at(stream, int.from_bytes(entry[12:16], "little"), 24)
        if head.startswith(b"\x89PNG") and len(head) == 24:
            width, height = struct.unpack(">II", head[16:])
            yield width, height
        elif len(head) >= 12:
            width, height = struct.unpack("<ii", head[4:12])
            yield abs(width), abs(height) // 2  # a bitmap and its mask


@dataclass
class Directory:
    """One image file directory (IFD) of a TIFF file. offset: where it begins. tags: integers of the tags asked for."""

    offset: int
    tags: dict[int, tuple[int, ...]] = field(default_factory=dict)

    def get(self, tag: int, default: int = 0) -> int:
        """The first value of a tag."""
        return (self.tags.get(tag) or (default,))[0]


@dataclass(frozen=True)
class _Layout:
    """How a TIFF file states numbers. order: "<" or ">". big: BigTIFF, with offsets of 8 bytes."""

    order: str
    big: bool

    @property
    def offset_code(self) -> str:
        return "Q" if self.big else "I"


def _layout(stream: BinaryIO) -> _Layout:
    head = read_at(stream, 0, 4)
    return _Layout("<" if head[:2] == b"II" else ">", head[2:4] in (b"\x2b\0", b"\0\x2b"))


class DirectoryError(ValueError):
    """The chain of directories is damaged or too long; the message says which."""


def tiff_directories(stream: BinaryIO, wanted: Sequence[int]) -> list[Directory]:
    """The chain of directories of a TIFF or BigTIFF file, each with the wanted tags.

    Raises DirectoryError for a chain in a circle, and for one of more than MAX_DIRECTORIES.
    """
    layout = _layout(stream)
    start = _number(layout, layout.offset_code, read_at(stream, 8 if layout.big else 4, 8))
    return _chain(stream, layout, start, frozenset(wanted))


def sub_directories(stream: BinaryIO, parents: Sequence[Directory], wanted: Sequence[int]) -> list[Directory]:
    """The directories that tag 330 (SubIFDs) of the parents points to: reduced copies, or the pixels of a raw file."""
    layout = _layout(stream)
    found = []
    for offset in (offset for parent in parents for offset in parent.tags.get(330, ())):
        directory, _ = _directory(stream, layout, offset, frozenset(wanted))
        found.append(directory)
        if len(found) == MAX_DIRECTORIES:
            break
    return found


def _number(layout: _Layout, code: str, data: bytes) -> int:
    size = struct.calcsize(layout.order + code)
    return int(struct.unpack(layout.order + code, data[:size])[0]) if len(data) >= size else 0


def _chain(stream: BinaryIO, layout: _Layout, offset: int, wanted: frozenset[int]) -> list[Directory]:
    found: dict[int, Directory] = {}
    while offset:
        if offset in found:
            raise DirectoryError(f"its chain of directories is a circle, after {len(found)} of them")
        if len(found) == MAX_DIRECTORIES:
            raise DirectoryError(f"it has more than {MAX_DIRECTORIES} images; split the file")
        found[offset], offset = _directory(stream, layout, offset, wanted)
    return list(found.values())


def _directory(stream: BinaryIO, layout: _Layout, offset: int, wanted: frozenset[int]) -> tuple[Directory, int]:
    """The directory at an offset, and the offset of the next one; 0 at the end."""
    count_size, entry_size, offset_size = (8, 20, 8) if layout.big else (2, 12, 4)
    if offset >= 1 << 62:
        return Directory(offset), 0
    count = _number(layout, "Q" if layout.big else "H", read_at(stream, offset, count_size))
    if count > _MAX_TAGS:
        return Directory(offset), 0
    data = read_at(stream, offset + count_size, count * entry_size + offset_size)
    directory = Directory(offset)
    for start in range(0, min(count, len(data) // entry_size) * entry_size, entry_size):
        tag = _number(layout, "H", data[start : start + 2])
        if tag in wanted:
            directory.tags[tag] = _values(stream, layout, data[start + 2 : start + entry_size])
    return directory, _number(layout, layout.offset_code, data[count * entry_size :])


def _values(stream: BinaryIO, layout: _Layout, entry: bytes) -> tuple[int, ...]:
    """The integers of a directory's entry, without its tag; none for a type that holds no integers."""
    offset_size = 8 if layout.big else 4
    kind = _number(layout, "H", entry)
    count = min(_number(layout, layout.offset_code, entry[2:]), _TIFF_VALUES)
    code = _TIFF_CODES.get(kind)
    if code is None:
        return ()
    size = count * _TIFF_SIZES[kind]
    data = entry[2 + offset_size :][:size]
    if size > offset_size:
        where = _number(layout, layout.offset_code, entry[2 + offset_size :])
        data = read_at(stream, where, size) if where < 1 << 62 else b""
    count = min(count, len(data) // _TIFF_SIZES[kind])
    return struct.unpack(f"{layout.order}{count}{code}", data[: count * _TIFF_SIZES[kind]])
