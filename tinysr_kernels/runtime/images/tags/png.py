"""The chunks of a PNG file that Pillow does not report, and those whose size it refuses."""

from __future__ import annotations

import io
import struct
import zlib
from typing import BinaryIO

from tinysr_kernels.runtime.images.color.h273 import Label
from tinysr_kernels.runtime.images.structure import png_chunks, read_at
from tinysr_kernels.runtime.notices import notice

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MAX_COMPRESSED_TEXT = 1 << 20  # decompressed, Pillow's limit
_MAX_TEXT = 16 << 20
_MAX_TEXTS = 32 << 20  # all together


def read_png(stream: BinaryIO) -> tuple[Label | None, bytes | None]:
    """The label of cICP and the contents of tIME."""
    label, modified = None, None
    for name, start, length in png_chunks(stream):
        if name == b"cICP" and length == 4 and label is None:
            stream.seek(start)
            primaries, transfer, matrix, full_range = stream.read(4)
            if matrix == 0 and full_range < 2:  # others are invalid (PNG, third edition, 11.3.2.6)
                label = Label(primaries, transfer, bool(full_range))
        elif name == b"tIME" and length == 7:
            time = read_at(stream, start, 7)
            _, month, day, hour, minute, second = struct.unpack(">H5B", time)
            valid = 1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second <= 60
            modified = time if valid else None
    return label, modified


def _text_length(name: bytes, data: bytes) -> int | None:
    """The length of a text's chunk, decompressed if need be; None if it is longer than Pillow accepts."""
    rest = data.partition(b"\0")[2]
    if name == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif name == b"zTXt":
        packed = rest[1:]
    else:
        return len(data)
    try:
        size = len(zlib.decompressobj().decompress(packed, _MAX_COMPRESSED_TEXT + 1))
    except zlib.error:
        return 0  # Pillow drops it
    return size if size <= _MAX_COMPRESSED_TEXT else None


def long_texts(stream: BinaryIO) -> list[tuple[int, int, str]]:
    """The chunks of texts beyond the limits, as (first byte, byte after the last, keyword)."""
    found, total = [], 0
    for name, start, length in png_chunks(stream):
        if name not in _TEXTS:
            continue
        short = length <= _MAX_TEXT and total + length <= _MAX_TEXTS
        data = read_at(stream, start, length if short else 80)
        size = _text_length(name, data) if short else None
        if size is None:
            found.append((start - 8, start + length + 4, data.partition(b"\0")[0][:79].decode("latin-1")))
        if short:  # bounds the work, too
            total += _MAX_COMPRESSED_TEXT if size is None else size
    return found


def without_long_texts(stream: BinaryIO) -> BinaryIO:
    """The stream, or, of a PNG with texts that Pillow refuses for their size, a file without them, with a notice."""
    if read_at(stream, 0, 8) != _SIGNATURE:
        return stream
    texts = long_texts(stream)
    if not texts:
        return stream
    names = ", ".join(repr(keyword[:40]) for _, _, keyword in texts[:6])
    notice(f"dropped {len(texts)} texts for their size: {names}")
    kept = io.BytesIO()
    position = 0
    for first, last, _ in [*texts, (stream.seek(0, 2), 0, "")]:
        kept.write(read_at(stream, position, max(0, first - position)))
        position = last
    return kept
