"""Write 16-bit PNG files: gray or RGB, with or without alpha. Pillow writes 16 bits of gray only."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

import numpy as np

from tinysr_kernels.files.writing.metadata import png_chunks
from tinysr_kernels.runtime.images.metadata import Metadata

_PNG_STRIP_BYTES = 1 << 20  # bounds the temporary buffers of filtering; does not affect speed


def to_8bit(pixels: np.ndarray) -> np.ndarray:
    """uint16 -> uint8 of the same shape, rounded to nearest (65535 / 255 = 257)."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _filtered(rows: np.ndarray, above: np.ndarray, step: int) -> bytes:
    """PNG filtering (ISO 15948, 9.2) of rows, given the rows above them, both uint8 [R,B]; step: bytes per pixel.

    Each row uses the filter with the smallest sum of absolute differences, the heuristic of section 12.8.
    """
    left, corner = np.zeros_like(rows), np.zeros_like(rows)
    left[:, step:], corner[:, step:] = rows[:, :-step], above[:, :-step]
    a, b, c = left.astype(np.int16), above.astype(np.int16), corner.astype(np.int16)
    distance_a, distance_b, distance_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest_a = (distance_a <= distance_b) & (distance_a <= distance_c)
    paeth = np.where(nearest_a, left, np.where(distance_b <= distance_c, above, corner))
    average = ((a + b) // 2).astype(np.uint8)
    choices = np.stack([rows, rows - left, rows - above, rows - average, rows - paeth])
    cost = np.abs(choices.view(np.int8).astype(np.int16)).sum(-1, dtype=np.int64)
    best = cost.argmin(0)
    chosen = np.take_along_axis(choices, best[None, :, None], 0)[0]
    return np.concatenate([best.astype(np.uint8)[:, None], chosen], 1).tobytes()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_metadata(metadata: Metadata) -> Iterator[bytes]:
    if metadata.icc:
        yield _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc))
    if metadata.dpi:
        x, y = (round(dots / 0.0254) for dots in metadata.dpi)
        yield _chunk(b"pHYs", struct.pack(">IIB", x, y, 1))
    if metadata.exif:
        yield _chunk(b"eXIf", metadata.exif.removeprefix(b"Exif\0\0"))
    for name, data in png_chunks(metadata):
        yield _chunk(name, data)


def encode_png(pixels: np.ndarray, metadata: Metadata) -> bytes:
    """uint16 [H,W,C], C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha -> the bytes of a 16-bit PNG file."""
    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), *_png_metadata(metadata)]
    packer = zlib.compressobj(6)
    line = width * channels * 2
    count = max(1, _PNG_STRIP_BYTES // line)
    previous = np.zeros((1, line), np.uint8)
    for start in range(0, height, count):
        strip = np.ascontiguousarray(pixels[start : start + count]).astype(">u2")
        rows = strip.reshape(len(strip), -1).view(np.uint8)
        above = np.concatenate([previous, rows[:-1]])
        previous = rows[-1:]
        packed = packer.compress(_filtered(rows, above, channels * 2))
        if packed:
            parts.append(_chunk(b"IDAT", packed))
    parts += [_chunk(b"IDAT", packer.flush()), _chunk(b"IEND", b"")]
    return b"".join(parts)
