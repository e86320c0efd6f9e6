"""Files made byte by byte, with parts that Pillow does not write."""

from __future__ import annotations

import struct
import zlib

import numpy as np


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(pixels: np.ndarray, *chunks: tuple[bytes, bytes], after: tuple[tuple[bytes, bytes], ...] = ()) -> bytes:
    """uint8 or uint16 [H,W,1..4] -> a PNG with more chunks before and after the pixels."""
    height, width, channels = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, pixels.itemsize * 8, kind, 0, 0, 0)
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def box(name: bytes, *contents: bytes) -> bytes:
    data = b"".join(contents)
    return struct.pack(">I", len(data) + 8) + name + data


def with_nclx(avif: bytes, primaries: int, transfer: int) -> bytes:
    """An AVIF file with other code points in its color box."""
    at = avif.index(b"colrnclx") + 8
    return avif[:at] + struct.pack(">HH", primaries, transfer) + avif[at + 4 :]


def bmp_v4(pixels: np.ndarray, points: np.ndarray, gamma: float, profile: bytes | None = None) -> bytes:
    """uint8 [H,W,3] -> a BMP with calibrated colors (points: XYZ of red, green, blue as rows) or a profile (V5)."""
    height, width, _ = pixels.shape
    rows = [row[:, ::-1].tobytes() + b"\0" * (-3 * width % 4) for row in pixels[::-1]]
    size = 124 if profile else 108
    data = b"".join(rows)
    info = struct.pack("<IiiHHIIiiII", size, width, height, 1, 24, 0, len(data), 0, 0, 0, 0) + bytes(16)
    info += b"MBED"[::-1] if profile else bytes(4)
    info += struct.pack("<9I", *(round(value * (1 << 30)) for value in points.ravel()))
    info += struct.pack("<3I", *[round(gamma * 65536)] * 3)
    if profile:
        info += struct.pack("<4I", 4, size + len(data), len(profile), 0)
    start = 14 + size
    return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + info + data + (profile or b"")


def jp2(codestream: bytes, color: bytes, width: int, height: int, channels: int, *more: bytes) -> bytes:
    """A JPEG 2000 codestream in a JP2 file with the contents of a color box, and more boxes."""
    header = struct.pack(">IIHBBBB", height, width, channels, 7, 7, 0, 0)
    return (
        box(b"jP  ", b"\r\n\x87\n")
        + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
        + box(b"jp2h", box(b"ihdr", header), box(b"colr", color))
        + b"".join(more)
        + box(b"jp2c", codestream)
    )
