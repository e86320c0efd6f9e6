"""Edit EXIF in place: everything that is not edited keeps its bytes and its offset.

Makers' notes hold offsets from the start of the EXIF, so that writing all directories anew, as Pillow does, breaks
them. Here entries are changed or removed where they stand, and directories that grow are appended (TIFF 6.0 section 2,
EXIF 2.32 section 4.6). All functions take and return EXIF with the header "Exif\\0\\0"; they raise struct.error or
ValueError if it is corrupt.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from typing import NamedTuple

HEADER = b"Exif\0\0"
EMPTY = HEADER + b"MM\0*\0\0\0\x08" + bytes(6)

_ORIENTATION, _EXIF_IFD = 0x0112, 0x8769
_PIXEL_X, _PIXEL_Y = 0xA002, 0xA003
DESCRIPTION, SOFTWARE, DATE, ARTIST, COPYRIGHT, USER_COMMENT = 0x010E, 0x0131, 0x0132, 0x013B, 0x8298, 0x9286
COLOR_SPACE, INTEROPERABILITY = 0xA001, 0xA005
# Positions and lengths in pixels of the input: the subject's place, the focal plane's pixels per length.
_IN_PIXELS = frozenset([0x9214, 0xA214, 0xA20E, 0xA20F, 0xA210])
_THUMBNAIL, _THUMBNAIL_LENGTH = 0x0201, 0x0202
# Tags that describe the storage of pixels in a TIFF, or that are handled separately (XMP 700, IPTC 33723, Photoshop
# 34377, ICC 34675). They must not be copied to another file.
STORAGE_TAGS = frozenset(
    tag
    for first, last in (
        *((254, 259), (262, 266), (273, 274), (277, 281), (284, 284), (288, 293), (297, 297), (301, 301)),
        *((317, 325), (330, 330), (332, 341), (347, 347), (512, 521), (529, 532), (700, 700)),
        *((33723, 33723), (34377, 34377), (34675, 34675)),
    )
    for tag in range(first, last + 1)
)
_SHORT, _LONG = 3, 4
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 129: 1}


class _Entry(NamedTuple):
    """One entry of a directory. position: of its 12 bytes. value: the last 4 of them, a value or its offset."""

    tag: int
    kind: int
    length: int
    position: int
    value: int


class _Blob:
    """EXIF without its header, as a TIFF structure in memory."""

    def __init__(self, exif: bytes) -> None:
        self.data = bytearray(re.sub(rb"^(Exif\0\0){1,2}", b"", exif))
        if bytes(self.data[:4]) not in (b"II*\0", b"MM\0*"):
            raise ValueError("no TIFF header")
        self.order = "<" if self.data[:2] == b"II" else ">"

    def number(self, position: int, kind: str = "I") -> int:
        (value,) = struct.unpack_from(self.order + kind, self.data, position)
        return int(value)

    def put(self, position: int, kind: str, *values: int) -> None:
        struct.pack_into(self.order + kind, self.data, position, *values)

    def entries(self, directory: int) -> list[_Entry]:
        found = []
        for index in range(self.number(directory, "H")):
            position = directory + 2 + 12 * index
            tag, kind, count, value = struct.unpack_from(self.order + "HHII", self.data, position)
            found.append(_Entry(tag, kind, count, position, value))
        return found

    def entry(self, directory: int, tag: int) -> _Entry | None:
        return next((entry for entry in self.entries(directory) if entry.tag == tag), None)

    def content(self, entry: _Entry) -> bytes:
        size = entry.length * _SIZES.get(entry.kind, 0)
        start = entry.position + 8 if size <= 4 else entry.value
        return bytes(self.data[start : start + size])

    @property
    def first(self) -> int:
        return self.number(4)

    @property
    def detail(self) -> int | None:
        """Where the directory of the camera's settings (the "Exif IFD") is; None if there is none."""
        entry = self.entry(self.first, _EXIF_IFD)
        return entry.value if entry else None

    def remove(self, directory: int, tags: frozenset[int]) -> None:
        entries = self.entries(directory)
        kept = [entry for entry in entries if entry.tag not in tags]
        table = b"".join(self.data[entry.position : entry.position + 12] for entry in kept)
        end = directory + 2 + 12 * len(entries)
        table += self.data[end : end + 4]
        table += bytes(end + 4 - directory - 2 - len(table))
        self.put(directory, "H", len(kept))
        self.data[directory + 2 : end + 4] = table

    def append(self, directory: int | None, new: Mapping[int, tuple[int, int, bytes]]) -> int:
        """Copy a directory to the end with new entries (type, count, content) -> where it is."""
        old = [] if directory is None else [entry for entry in self.entries(directory) if entry.tag not in new]
        raw = {entry.tag: bytes(self.data[entry.position : entry.position + 12]) for entry in old}
        for tag, (kind, count, content) in new.items():
            value = content.ljust(4, b"\0")
            if len(content) > 4:
                self.data += bytes(len(self.data) % 2)
                value = struct.pack(self.order + "I", len(self.data))
                self.data += content
            raw[tag] = struct.pack(self.order + "HHI", tag, kind, count) + value
        self.data += bytes(len(self.data) % 2)
        start = len(self.data)
        self.data += struct.pack(self.order + "H", len(raw)) + b"".join(raw[tag] for tag in sorted(raw)) + bytes(4)
        return start

    def drop_thumbnail(self) -> None:
        """Unlink the second directory and overwrite it and its picture, which shows the image as it was."""
        link = self.first + 2 + 12 * self.number(self.first, "H")
        if link + 4 > len(self.data):
            return  # some writers omit the link
        directory = self.number(link)
        self.put(link, "I", 0)
        if not 8 <= directory < len(self.data) - 2:
            return
        fields = {entry.tag: entry.value for entry in self.entries(directory)}
        start, length = fields.get(_THUMBNAIL, 0), fields.get(_THUMBNAIL_LENGTH, 0)
        table = 2 + 12 * self.number(directory, "H") + 4
        for position, size in ((directory, table), (start, length)):
            if position >= 8:
                self.data[position : position + size] = bytes(len(self.data[position : position + size]))
        if start > 8 and start + length >= len(self.data) - 1:
            del self.data[start:]

    def exif(self) -> bytes:
        return HEADER + bytes(self.data)


def cleaned(exif: bytes) -> bytes | None:
    """Without orientation, thumbnail and what states positions in pixels or the storage of a TIFF; None if empty."""
    blob = _Blob(exif)
    blob.drop_thumbnail()
    blob.remove(blob.first, STORAGE_TAGS)
    if blob.detail:
        blob.remove(blob.detail, _IN_PIXELS)
    return blob.exif() if blob.entries(blob.first) else None


def resized(exif: bytes, width: int, height: int) -> bytes:
    """With the size in pixels where the EXIF states one."""
    blob = _Blob(exif)
    for entry in blob.entries(blob.detail) if blob.detail else []:
        if entry.tag in (_PIXEL_X, _PIXEL_Y):
            value = width if entry.tag == _PIXEL_X else height
            blob.put(entry.position + 2, "HII", _LONG, 1, value)
    return blob.exif()


def read_text(exif: bytes, tag: int) -> str | None:
    """The text of a tag of the first directory or, for USER_COMMENT, of the camera's settings."""
    blob = _Blob(exif)
    directory = blob.detail if tag == USER_COMMENT else blob.first
    entry = blob.entry(directory, tag) if directory else None
    if entry is None:
        return None
    content = blob.content(entry)
    if tag == USER_COMMENT:
        code, content = content[:8], content[8:]
        if code == b"UNICODE\0":
            return content.decode("utf-16-le" if blob.order == "<" else "utf-16-be", "replace").rstrip("\0 ")
    return content.decode("utf-8", "replace").strip("\0 ")


def with_texts(exif: bytes | None, texts: Mapping[int, str]) -> bytes:
    """With texts added: tags of the first directory in UTF-8; USER_COMMENT among the camera's settings in UTF-16."""
    blob = _Blob(exif or EMPTY)
    first: dict[int, tuple[int, int, bytes]] = {}
    for tag, text in texts.items():
        if tag == USER_COMMENT:
            content = b"UNICODE\0" + text.encode("utf-16-le" if blob.order == "<" else "utf-16-be", "replace")
            detail = blob.append(blob.detail, {tag: (7, len(content), content)})
            first[_EXIF_IFD] = (_LONG, 1, struct.pack(blob.order + "I", detail))
        else:
            content = text.replace("\0", " ").encode("utf-8", "replace") + b"\0"
            first[tag] = (2, len(content), content)
    start = blob.append(blob.first, first)
    blob.put(4, "I", start)
    return blob.exif()


def is_adobe_rgb(exif: bytes) -> bool:
    """Whether the EXIF states Adobe RGB: as ColorSpace 2, or as DCF does (uncalibrated, interoperability R03)."""
    blob = _Blob(exif)
    directory = blob.detail
    entry = blob.entry(directory, COLOR_SPACE) if directory else None
    if directory is None or entry is None or entry.kind != _SHORT:
        return False
    value = blob.number(entry.position + 8, "H")
    link = blob.entry(directory, INTEROPERABILITY)
    if value != 0xFFFF or link is None:
        return value == 2
    index = blob.entry(link.value, 1)
    return index is not None and blob.content(index)[:3] == b"R03"
