"""What a file states about its color and contents that Pillow does not report.

PNG: cICP and tIME. AVIF and HEIF: the nclx color of the primary item. JPEG 2000: the color space and XMP. BMP: color
space and embedded profile. TIFF: primaries and transfer function. GIF: XMP. Every read is bounded, and a file that is
malformed here is left to Pillow to refuse.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from tinysr_kernels.runtime.images.color.h273 import Label
from tinysr_kernels.runtime.images.color.icc_writer import Curve, Primaries, write_profile
from tinysr_kernels.runtime.images.tags.png import read_png
from tinysr_kernels.runtime.images.tags.xmp import GAIN_MAP

_MAX_BOXES = 1000
_MAX_BYTES = 16 << 20  # of one profile, packet or box of properties

_ROMM: Primaries = ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585))
_ROMM_CURVE = Curve((1.8, 1.0, 0.0, 1 / 16, 1 / 32))
_XMP_UUID = bytes.fromhex("be7acfcb97a942e89c71999491e3afac")
_EXIF_UUID = b"JpgTiffExif->JP2"


@dataclass(frozen=True)
class Header:
    """label: of the colors. modified: a PNG's tIME. profile: ICC, embedded or equal in meaning to what the file states.

    exif, xmp: as in `Metadata`. lost: parts of the file that a result cannot have.
    """

    label: Label | None = None
    modified: bytes | None = None
    profile: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    lost: tuple[str, ...] = ()


def read_header(stream: BinaryIO | None, form: str | None) -> Header:
    """Read a file's header. stream: the open file, whose position is kept; of an image in memory there is none.

    form: Pillow's name of the file format.
    """
    reader = _READERS.get(form or "")
    if stream is None or reader is None or getattr(stream, "closed", False):
        return Header()
    try:
        position = stream.tell()
        try:
            return reader(stream)
        finally:
            stream.seek(position)
    except (OSError, ValueError, struct.error, IndexError, KeyError, OverflowError):
        return Header()


def _boxes(stream: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of an ISO base media or JPEG 2000 file as (type, start of the contents, end)."""
    position = start
    for _ in range(_MAX_BOXES):
        if position + 8 > end:
            return
        stream.seek(position)
        size, name = struct.unpack(">I4s", stream.read(8))
        head = 8
        if size == 1:
            (size,) = struct.unpack(">Q", stream.read(8))
            head = 16
        stop = end if size == 0 else position + size
        if size != 0 and (size < head or stop > end):
            return
        yield name, position + head, stop
        position = stop


def _size(stream: BinaryIO) -> int:
    return stream.seek(0, 2)


def _contents(stream: BinaryIO, start: int, end: int) -> bytes:
    if end - start > _MAX_BYTES:
        raise ValueError("too long")
    stream.seek(start)
    return stream.read(end - start)


def _properties_of(ipma: bytes, item: int) -> list[int]:
    """Indices, from 1, of the properties of an item (ISO 14496-12, 8.11.14)."""
    version, flags, count = ipma[0], ipma[3], struct.unpack_from(">I", ipma, 4)[0]
    position = 8
    for _ in range(count):
        number = struct.unpack_from(">I" if version else ">H", ipma, position)[0]
        position += 4 if version else 2
        amount = ipma[position]
        position += 1
        kind = ">H" if flags & 1 else ">B"
        width = struct.calcsize(kind)
        if number == item:
            mask = 0x7FFF if width == 2 else 0x7F
            return [struct.unpack_from(kind, ipma, position + width * i)[0] & mask for i in range(amount)]
        position += amount * width
    return []


def _nclx(content: bytes) -> Label | None:
    if content[:4] != b"nclx" or len(content) < 8:
        return None
    return Label(*struct.unpack_from(">HH", content, 4))  # decoders return RGB of the full range


def _read_heif(stream: BinaryIO) -> Header:
    meta = next(((start, end) for name, start, end in _boxes(stream, 0, _size(stream)) if name == b"meta"), None)
    if meta is None:
        return Header()
    parts = {name: (start, end) for name, start, end in _boxes(stream, meta[0] + 4, meta[1])}
    pitm = _contents(stream, *parts[b"pitm"]) if b"pitm" in parts else b""
    lost: tuple[str, ...] = ()
    items = _contents(stream, *parts[b"iinf"]) if b"iinf" in parts else b""
    properties = _contents(stream, *parts[b"iprp"]) if b"iprp" in parts else b""
    if b"tmap" in items or b"hdrgainmap" in properties:
        lost = (GAIN_MAP,)
    if not pitm or not properties:
        return Header(lost=lost)
    primary = struct.unpack_from(">I" if pitm[0] else ">H", pitm, 4)[0]
    inner = {name: (start, end) for name, start, end in _boxes(stream, *parts[b"iprp"])}
    listed = [(name, start, end) for name, start, end in _boxes(stream, *inner[b"ipco"])]
    for index in _properties_of(_contents(stream, *inner[b"ipma"]), primary):
        if 1 <= index <= len(listed) and listed[index - 1][0] == b"colr":
            label = _nclx(_contents(stream, *listed[index - 1][1:]))
            if label:
                return Header(label=label, lost=lost)
    return Header(lost=lost)


_JP2_SPACES = {12: "CMYK", 14: "CIELab", 20: "e-sRGB", 24: "e-sYCC"}


def _jp2_color(content: bytes) -> Header:
    """A color specification box (ISO 15444-1, I.5.3.3; ISO 15444-2, M.11.7.3)."""
    method = content[0]
    if method in (2, 3):
        return Header(profile=content[3:])
    if method == 5 and len(content) >= 7:
        return Header(label=Label(*struct.unpack_from(">HH", content, 3)))
    if method == 1:
        (space,) = struct.unpack_from(">I", content, 3)
        if space == 21:
            return Header(profile=write_profile("ROMM RGB", _ROMM, (_ROMM_CURVE,)))
        if space in _JP2_SPACES and space != 12:
            return Header(lost=(f"the color space {_JP2_SPACES[space]} (the pixels were treated as sRGB)",))
    return Header()


def _read_jpeg2000(stream: BinaryIO) -> Header:
    end = _size(stream)
    found = Header()
    exif = xmp = None
    for name, start, stop in _boxes(stream, 0, end):
        if name == b"jp2h" and found == Header():
            colr = [box for box in _boxes(stream, start, stop) if box[0] == b"colr"]
            found = _jp2_color(_contents(stream, *colr[0][1:])) if colr else Header()
        elif name == b"uuid" and stop - start >= 16:
            content = _contents(stream, start, stop)
            if content[:16] == _XMP_UUID:
                xmp = content[16:]
            elif content[:16] == _EXIF_UUID:
                exif = content[16:]
    return Header(label=found.label, profile=found.profile, exif=exif, xmp=xmp, lost=found.lost)


def _read_bmp(stream: BinaryIO) -> Header:
    """The color space of a BITMAPV4HEADER or BITMAPV5HEADER."""
    stream.seek(14)
    head = stream.read(124)
    (size,) = struct.unpack_from("<I", head)
    if size < 108:
        return Header()
    space = head[56:60][::-1]
    if space == b"MBED" and size >= 124:
        offset, length = struct.unpack_from("<II", head, 112)
        return Header(profile=_contents(stream, 14 + offset, 14 + offset + length))
    if space == b"LINK":
        return Header(lost=("a linked color profile (the pixels were treated as sRGB)",))
    if space != b"\0\0\0\0":
        return Header()
    points = [struct.unpack_from("<3I", head, 60 + 12 * index) for index in range(3)]
    gammas = struct.unpack_from("<3I", head, 96)
    if not all(map(sum, points)) or not all(gammas):
        return Header()  # many writers leave the fields empty
    x_y = [(x / (x + y + z), y / (x + y + z)) for x, y, z in points]
    white = [sum(column) for column in zip(*points, strict=True)]
    primaries = (x_y[0], x_y[1], x_y[2], (white[0] / sum(white), white[1] / sum(white)))
    curves = tuple(Curve((gamma / 65536,)) for gamma in gammas)
    return Header(profile=write_profile("BMP calibrated RGB", primaries, curves))


def _read_gif(stream: BinaryIO) -> Header:
    data = _contents(stream, 0, min(_size(stream), _MAX_BYTES))
    start = data.find(b"\x21\xff\x0bXMP DataXMP")
    if start < 0:
        return Header()
    end = data.find(b"\x01\xff\xfe\xfd", start)
    return Header(xmp=data[start + 14 : end]) if end > 0 else Header()


_READERS = {
    "PNG": lambda stream: Header(*read_png(stream)),
    "AVIF": _read_heif,
    "HEIF": _read_heif,
    "JPEG2000": _read_jpeg2000,
    "BMP": _read_bmp,
    "GIF": _read_gif,
}
