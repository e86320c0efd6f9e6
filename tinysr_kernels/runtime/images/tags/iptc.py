"""IPTC records (IIM version 4.2) and the Photoshop resource blocks that hold them in JPEG and PSD files."""

from __future__ import annotations

import re
import struct

_RESOURCE = 0x0404
_PREVIEWS = range(200, 203)


def without_raster(records: bytes) -> bytes | None:
    """The envelope and the texts (records 1 and 2) of well-formed data; None if nothing is left.

    Records 3 to 9 state the size and storage of the old pixels, and 2:200 to 2:202 hold a preview of them.
    """
    kept, position = bytearray(), 0
    while position + 5 <= len(records) and records[position] == 0x1C:
        record, dataset, size = struct.unpack_from(">BBH", records, position + 1)
        start = position + 5
        if size & 0x8000:  # the length follows, in this many bytes
            count = size & 0x7FFF
            if count > 4:
                break
            size = int.from_bytes(records[start : start + count], "big")
            start += count
        end = start + size
        if end > len(records):
            break
        if record in (1, 2) and not (record == 2 and dataset in _PREVIEWS):
            kept += records[position:end]
        position = end
    return bytes(kept) or None


def from_resources(block: bytes) -> bytes | None:
    """The IPTC records among Photoshop's resources ("8BIM", type, name, length, data; aligned to 2 bytes)."""
    position = 0
    while block[position : position + 4] == b"8BIM" and position + 12 <= len(block):
        (kind,) = struct.unpack_from(">H", block, position + 4)
        position += 6 + (block[position + 6] + 2) // 2 * 2
        if position + 4 > len(block):
            break
        (size,) = struct.unpack_from(">I", block, position)
        if kind == _RESOURCE:
            return block[position + 4 : position + 4 + size]
        position += 4 + (size + 1) // 2 * 2
    return None


def jpeg_segment(records: bytes) -> bytes:
    """The records as the APP13 segment of a JPEG. Raises ValueError if they are too long for a segment."""
    padded = records + b"\0" * (len(records) % 2)
    data = b"Photoshop 3.0\0" + struct.pack(">4sHHI", b"8BIM", _RESOURCE, 0, len(records)) + padded
    if len(data) > 65533:
        raise ValueError("too long for a JPEG segment")
    return b"\xff\xed" + struct.pack(">H", len(data) + 2) + data


def to_png_text(records: bytes) -> str:
    """The records as the text "Raw profile type iptc", as ImageMagick and Exiv2 write it in PNG files."""
    digits = records.hex()
    lines = [digits[start : start + 72] for start in range(0, len(digits), 72)]
    return "\n".join(["", "iptc", f"{len(records):8d}", *lines, ""])


def from_png_text(text: str) -> bytes | None:
    """The data of a text "Raw profile type ...": a name, a length and hexadecimal digits; None if it is malformed.

    Of Photoshop's resource blocks, the IPTC records.
    """
    match = re.fullmatch(r"\s*(\w+)\s+(\d{1,9})\s+([0-9a-fA-F\s]*)", text)
    if not match:
        return None
    try:
        data = bytes.fromhex("".join(match[3].split()))
    except ValueError:
        return None
    if data.startswith(b"8BIM"):
        return from_resources(data)
    return data[: int(match[2])]
