"""Decode damaged or truncated files as far as they go: the file is completed, then decoded as usual.

Pillow's own switch, ImageFile.LOAD_TRUNCATED_IMAGES, holds for all threads of a program and says nothing of what is
missing.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
from PIL import Image

from tinysr_kernels.runtime.images.structure import contents, png_chunks, read_at

_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_PIECE = 4096  # a damaged stream is decompressed in pieces, so that what precedes the damage is kept
_EOI = b"\xff\xd9"
_NOISE = bytes(range(1, 255)) * 256  # decodes to something else than nothing does; holds no JPEG marker

PARTIAL_FORMATS = ("JPEG", "MPO", "PNG", "BMP", "DIB", "PPM", "TGA")
"""Formats of which a part can be decoded, besides TIFF."""

Load = Callable[[BinaryIO], Image.Image]


def complete(stream: BinaryIO, form: str, load: Load) -> tuple[BinaryIO, int]:
    """A file that ends early -> a whole file in memory, and how many rows of its pixels are missing or incomplete.

    form: Pillow's name of the format, one of PARTIAL_FORMATS. load: opens and loads a file; raises what Pillow's
    decoders raise on damaged data, also from here.
    """
    if form in ("JPEG", "MPO"):
        return _complete_jpeg(stream, load)
    return _complete_png(stream) if form == "PNG" else _complete_raw(stream, load)


def _differing_rows(first: Image.Image, second: Image.Image) -> np.ndarray:
    a, b = np.asarray(first), np.asarray(second)
    return (a != b).reshape(len(a), -1).any(1)


def _complete_jpeg(stream: BinaryIO, load: Load) -> tuple[BinaryIO, int]:
    """Append the end marker. What is missing is what another end changes, and what follows it."""
    data = contents(stream)
    rows = _differing_rows(load(io.BytesIO(data + _EOI)), load(io.BytesIO(data + _NOISE + _EOI)))
    return io.BytesIO(data + _EOI), len(rows) - int(rows.argmax()) if rows.any() else 0


def _complete_raw(stream: BinaryIO, load: Load) -> tuple[BinaryIO, int]:
    """Append zeros for all pixels. What is missing is what other bytes change."""
    data = contents(stream)
    stream.seek(0)
    with Image.open(stream) as image:
        size = image.width * image.height * 4 + 4096
    rows = _differing_rows(load(io.BytesIO(data + bytes(size))), load(io.BytesIO(data + b"\x55" * size)))
    return io.BytesIO(data + bytes(size)), int(rows.sum())


def _complete_png(stream: BinaryIO) -> tuple[BinaryIO, int]:
    """Decompress what can be, append empty rows, and compress it again."""
    head, packed = [b"\x89PNG\r\n\x1a\n"], list[bytes]()
    header, sound = b"", -1  # sound: bytes of pixels before the first chunk whose checksum is wrong; -1: all
    for name, offset, length in png_chunks(stream):
        data = read_at(stream, offset, length)
        if name == b"IDAT":
            if sound < 0 and len(data) == length and not _is_sound(stream, name, data):
                sound = sum(len(part) for part in packed)
            packed.append(data)
        elif len(data) < length or (name == b"IEND"):
            break
        elif not packed:
            header = data if name == b"IHDR" else header
            head.append(_chunk(name, data))
    if len(header) != 13:
        raise SyntaxError("the header is missing")
    width, height, depth, color, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _PNG_CHANNELS.get(color, 1)
    lines = _interlaced_lines(width, height, bits) if interlaced else [(height, 1 + (width * bits + 7) // 8)]
    size = sum(rows * line for rows, line in lines)
    joined = b"".join(packed)
    plain = _until_a_wrong_filter(_decompressed_part(joined, size), lines)
    known = len(plain) if sound < 0 else min(len(plain), len(_decompressed_part(joined[:sound], size)))
    missing = _missing_rows(known, lines, height)
    head += [_chunk(b"IDAT", zlib.compress(plain.ljust(size, b"\0"), 1)), _chunk(b"IEND", b"")]
    return io.BytesIO(b"".join(head)), missing


def _is_sound(stream: BinaryIO, name: bytes, data: bytes) -> bool:
    """Whether the checksum at the stream's position is that of a chunk."""
    return stream.read(4) == struct.pack(">I", zlib.crc32(name + data))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _interlaced_lines(width: int, height: int, bits: int) -> list[tuple[int, int]]:
    """Rows and bytes per row of each pass of an interlaced PNG (ISO 15948, 8.2)."""
    lines = []
    for x, y, step_x, step_y in _ADAM7:
        columns, rows = -(-(width - x) // step_x), -(-(height - y) // step_y)
        if columns > 0 and rows > 0:
            lines.append((rows, 1 + (columns * bits + 7) // 8))
    return lines


def _decompressed_part(data: bytes, size: int) -> bytes:
    unpacker, parts, left = zlib.decompressobj(), [], size
    try:
        for start in range(0, len(data), _PIECE):
            parts.append(unpacker.decompress(data[start : start + _PIECE], left))
            left -= len(parts[-1])
            if left <= 0:
                break
    except zlib.error:
        pass  # the damage: what precedes it is kept
    return b"".join(parts)


def _until_a_wrong_filter(plain: bytes, lines: list[tuple[int, int]]) -> bytes:
    """Filtered rows up to the first whose filter (ISO 15948, 9.2) does not exist."""
    start = 0
    for rows, line in lines:
        filters = np.frombuffer(plain, np.uint8)[start : start + rows * line : line]
        wrong = filters > 4
        if wrong.any():
            return plain[: start + int(wrong.argmax()) * line]
        start += rows * line
    return plain


def _missing_rows(found: int, lines: list[tuple[int, int]], height: int) -> int:
    """Rows of the image that miss pixels; with interlacing, all of them until the last pass begins."""
    rows, line = lines[-1]
    missing_lines = min(rows, -(-max(0, sum(r * n for r, n in lines) - found) // line))
    return min(height, missing_lines * (1 if len(lines) == 1 else 2))
