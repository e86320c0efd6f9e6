"""Metadata in the tags of a TIFF file, classic or BigTIFF, as Pillow reads them."""

from __future__ import annotations

import re
from typing import Any

from PIL import ExifTags, Image, TiffTags

from tinysr_kernels.runtime.images.tags import iptc
from tinysr_kernels.runtime.images.tags.exif import DESCRIPTION, STORAGE_TAGS, USER_COMMENT

_IPTC, _PHOTOSHOP, _LAYERS = 33723, 34377, 37724
_MAKER_NOTE = 0x927C
_GROUPS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
# Makers' notes whose offsets count from their own start, so that they may move. Others are dropped.
_MOVABLE = (b"Nikon\0\x02", b"OLYMPUS\0", b"OM SYSTEM\0", b"FUJIFILM", b"Apple iOS\0", b"PENTAX \0")
# Private tags that say nothing about the pixels' number or place: copyright, exposure, GPS, camera, Windows' texts.
_KEPT_RANGES = ((33432, 33437), (34665, 34665), (34850, 34868), (36864, 37522), (40091, 40095), (41985, 42037))
# Descriptions that programs write for themselves: shapes, channels, layouts.
_MACHINE = re.compile(r"""\s*(\{\s*"|ImageJ=|SCIFIO=|<\?xml|<OME|Aperio |DICOM_|<MetaData)""")
_NAMES = {
    **dict.fromkeys((33550, 33922, 34264, 34735, 34736, 34737), "georeference (GeoTIFF)"),
    **dict.fromkeys((42112, 42113), "GDAL metadata"),
    **dict.fromkeys((50838, 50839), "ImageJ metadata"),
    _LAYERS: "Photoshop layers",
}


def _kept(tag: int) -> bool:
    if tag in STORAGE_TAGS:
        return False
    return tag < 32768 or any(first <= tag <= last for first, last in _KEPT_RANGES)


def _states_size(text: Any, image: Image.Image) -> bool:
    """Whether a description states the shape of the old pixels."""
    if not isinstance(text, str):
        return False
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    width, height = tags.get(256), tags.get(257)
    return bool(_MACHINE.match(text) or re.search(rf"\b{width}\s*[xX,*×]\s*{height}\b", text))


def _unicode_kept(tag: int, value: Any) -> Any:
    """A text as bytes: Pillow reads texts as Latin-1, and would write question marks beyond ASCII."""
    is_text = isinstance(value, str) and not value.isascii() and TiffTags.lookup(tag).type == TiffTags.ASCII
    return value.encode("latin-1", "replace") if is_text else value


def exif_of(image: Image.Image) -> bytes | None:
    """The tags that describe the picture, written as EXIF: tags of storage and of other programs are left out."""
    source = image.getexif()
    made = Image.Exif()
    made.endian = source.endian
    for tag in [tag for tag in source if _kept(tag) and tag not in _GROUPS]:
        if not (tag == DESCRIPTION and _states_size(source[tag], image)):
            made[tag] = _unicode_kept(tag, source[tag])
    for group in _GROUPS:
        content = dict(source.get_ifd(group)) if group in source else {}
        _without_fixed_note(content)
        if isinstance(content.get(ExifTags.IFD.Interop), int):
            content[ExifTags.IFD.Interop] = dict(source.get_ifd(ExifTags.IFD.Interop))
        if content:
            made[group] = content
    return made.tobytes() if len(made) else None


def tags_of(exif: bytes) -> tuple[dict[int, Any], list[str]]:
    """EXIF as the tags of a TIFF in little-endian order, and the names of those that cannot move there."""
    loaded = Image.Exif()
    loaded.load(exif)
    found: dict[int, Any] = {tag: _unicode_kept(tag, loaded[tag]) for tag in loaded if tag not in _GROUPS}
    for group in _GROUPS:
        content = dict(loaded.get_ifd(group))
        content.pop(ExifTags.IFD.Interop, None)
        if content:
            found[group] = content
    detail = found.get(ExifTags.IFD.Exif, {})
    lost = _without_fixed_note(detail)
    comment = detail.get(USER_COMMENT)
    if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0") and loaded.endian == ">":
        detail[USER_COMMENT] = comment[:8] + comment[8:].decode("utf-16-be", "replace").encode("utf-16-le", "replace")
    return found, lost


def _without_fixed_note(detail: dict[int, Any]) -> list[str]:
    """Remove a maker's note that may not move from the camera's settings -> what was lost."""
    note = detail.get(_MAKER_NOTE)
    if not isinstance(note, bytes) or note.startswith(_MOVABLE):
        return []
    del detail[_MAKER_NOTE]
    return ["the maker's note"]


def iptc_of(tags: Any) -> bytes | None:
    """The IPTC records among a TIFF's tags, its own or Photoshop's."""
    found = tags.get(_IPTC)
    if isinstance(found, tuple):  # some writers give 32-bit numbers as the type of these bytes
        found = b"".join(int(value).to_bytes(4, "little" if tags.prefix == b"II" else "big") for value in found)
    if isinstance(found, bytes):
        return found
    block = tags.get(_PHOTOSHOP)
    return iptc.from_resources(block) if isinstance(block, bytes) else None


def lost(image: Image.Image) -> list[str]:
    """Names of the tags that `exif_of` leaves out and that describe more than the storage."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    names = [_NAMES.get(tag, f"TIFF tag {tag}") for tag in tags if not _kept(tag) and tag not in STORAGE_TAGS]
    if _states_size(tags.get(DESCRIPTION), image):
        names.append("a description that states the size (TIFF tag 270)")
    return names + _without_fixed_note(dict(image.getexif().get_ifd(ExifTags.IFD.Exif)))
