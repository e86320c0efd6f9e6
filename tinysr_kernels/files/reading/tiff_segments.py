"""The strips and tiles of a TIFF page: decompressed within bounds, put into one array."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from tinysr_kernels.files.reading.decoded import notice_missing

if TYPE_CHECKING:
    from tifffile import TiffPage

_NONE, _LZW, _DEFLATE, _PACKBITS, _OLD_DEFLATE, _LZMA, _ZSTD = 1, 5, 8, 32773, 32946, 34925, 50000
LOSSLESS = (_NONE, _LZW, _DEFLATE, _PACKBITS, _OLD_DEFLATE, _LZMA, _ZSTD)
"""Compressions of plain bytes."""

# A tile has at least 16x16 pixels and a strip a row, so that even large images have fewer.
_MAX_SEGMENTS = 1 << 17
_OVERHEAD = 4096


class SegmentError(ValueError):
    """A strip or tile is damaged or missing."""


def read_segments(page: TiffPage, allow_truncated: bool) -> np.ndarray:
    """A page of 8- or 16-bit samples in a LOSSLESS compression -> [planes, H, W, samples], native byte order.

    One of the axes planes and samples is 1. allow_truncated: leave damaged and missing parts zero, with a notice.
    Raises SegmentError otherwise.
    """
    planes, depth, height, width, samples = page.shaped
    count = math.prod(page.chunked)
    offsets, lengths = page.dataoffsets[:count], page.databytecounts[:count]
    if count > _MAX_SEGMENTS or depth != 1:
        raise SegmentError(f"{count} strips or tiles of {depth} layers are too many; save it again")
    result = np.zeros((planes, height, width, samples), page.dtype)
    # From here on segments are plain bytes; tifffile undoes predictor and byte order, and knows where each one belongs.
    compression, page.compression = page.compression, 1
    missing: list[tuple[int, int]] = []
    for index in range(count):
        _, (plane, _, top, left, _), (_, rows, columns, _) = page.decode(None, index, _fullsize=page.is_tiled)
        try:
            if index >= min(len(offsets), len(lengths)):
                raise SegmentError("strips or tiles are missing")
            if lengths[index] == 0 and offsets[index] == 0:
                continue  # sparse: nothing is stored for an empty tile
            size = rows * columns * samples * result.itemsize
            stored = _stored(page, offsets[index], lengths[index], size)
            data = _decompressed(stored, compression, size, rows)
            segment, _, _ = page.decode(data, index, _fullsize=page.is_tiled)
        except (SegmentError, ValueError, OSError, EOFError, zlib.error) as error:
            if not allow_truncated:
                raise SegmentError(f"strip or tile {index} of {count}: {error}") from error
            missing.append((top, min(rows, height - top)))
            continue
        part = result[plane, top : top + rows, left : left + columns]
        assert segment is not None
        part[...] = segment[0, : part.shape[0], : part.shape[1]]
    if missing:
        rows_missing = len({row for top, rows in missing for row in range(top, top + rows)})
        notice_missing(rows_missing, height)
    return result


def _stored(page: TiffPage, offset: int, length: int, size: int) -> bytes:
    """A segment as stored; cut to what any compression makes of its size, as segments may claim the same bytes."""
    file = page.parent.filehandle
    if offset + length > file.size:
        raise SegmentError("the file is truncated")
    file.seek(offset)
    return file.read(min(length, 2 * size + _OVERHEAD))


def _decompressed(data: bytes, compression: int, size: int, rows: int) -> bytes:
    """size: of the result in bytes; what a damaged or hostile segment holds beyond it is not decompressed."""
    if compression == _NONE:
        plain = data
    elif compression in (_DEFLATE, _OLD_DEFLATE):
        plain = zlib.decompressobj().decompress(data, size)
    else:
        plain = _through_libtiff(data, compression, size, rows)
    if len(plain) < size:
        raise SegmentError(f"{len(plain)} bytes instead of {size}")
    return plain[:size]


def _through_libtiff(data: bytes, compression: int, size: int, rows: int) -> bytes:
    """Decompress bytes with Pillow's libtiff: as the only strip of an 8-bit gray image of the same number of rows."""
    tags = [(256, size // rows), (257, rows), (258, 8), (259, compression), (262, 1), (273, 0), (278, rows)]
    tags.append((279, len(data)))
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    file = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + b"\0\0\0\0" + data
    with Image.open(io.BytesIO(file), formats=["TIFF"]) as image:
        return image.tobytes()
