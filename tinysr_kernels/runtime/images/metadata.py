"""Metadata of one image: EXIF, XMP, IPTC, texts, color and resolution, and how they change with the image's size."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from tinysr_kernels.runtime.images.color.declared import declared_color
from tinysr_kernels.runtime.images.color.h273 import Label
from tinysr_kernels.runtime.images.tags import exif as exif_tags
from tinysr_kernels.runtime.images.tags import iptc as iptc_tags
from tinysr_kernels.runtime.images.tags import tiff, xmp
from tinysr_kernels.runtime.images.tags.header import Header
from tinysr_kernels.runtime.images.tags.xmp import GAIN_MAP
from tinysr_kernels.runtime.notices import notice

# What Pillow's parsers raise on corrupt metadata.
PARSE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    SyntaxError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
)

COMMENT = "Comment"
"""The keyword of texts that are comments: those of JPEG and GIF, and PNG's standard keyword."""

_ORIENTATION = 0x0112
_RAW_PROFILE = "Raw profile type "
_GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")
_READ_PROFILES = ("exif", "iptc", "xmp", "icc", "icm")
# Texts in Pillow's `info` that are no texts of the file, or are handled separately.
_NOT_TEXT = ("XML:com.adobe.xmp", "comment", "compression")
# Names under which Pillow and this package hold something else: a text of that name has displaced it.
_TAKEN = frozenset(
    [
        *("exif", "icc_profile", "xmp", "dpi", "gamma", "chromaticity", "srgb", "transparency", "aspect", "background"),
        *("loop", "duration", "photoshop", "cicp", "nclx_profile", "aux", "depth_images"),
    ]
)
# Comments by which encoders sign their work, which is not the result's.
_SIGNATURES = ("Created by OpenJPEG", "Kakadu-", "CREATOR: gd-jpeg", "Lavc")
_MAX_TEXTS = 16 << 20  # characters, all together


@dataclass(frozen=True)
class Metadata:
    """Metadata of one image. None or empty: absent.

    exif: with the "Exif\\0\\0" header, without orientation. xmp: the packet. icc: the profile. dpi: dots per inch in x
    and y. label: code points that mean the same as `icc`, or, for PQ and HLG, what no profile can mean. iptc: IIM
    records. texts: keywords and texts, as in PNG; a text may have `lang` and `tkey` (Pillow's iTXt). modified: the
    contents of PNG's tIME.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    label: Label | None = None
    iptc: bytes | None = None
    texts: tuple[tuple[str, str], ...] = ()
    modified: bytes | None = None

    def resized(self, width: int, height: int) -> Metadata:
        """Metadata for a resized image: existing fields that state the size in pixels are updated."""
        packet = xmp.resized(self.xmp, width, height) if self.xmp else None
        return replace(self, exif=_exif_resized(self.exif, width, height), xmp=packet)

    def stripped(self) -> Metadata:
        """Color alone: the ICC profile and the label stay, because they define the colors of the pixels."""
        return Metadata(icc=self.icc, label=self.label)

    def without_color(self) -> Metadata:
        """For pixels that were converted to sRGB."""
        return replace(self, icc=None, label=None)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it is absent or unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except PARSE_ERRORS as error:
        notice(f"EXIF cannot be read, the orientation was not applied ({error})")
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _raw_exif(image: Image.Image, header: Header) -> bytes | None:
    """The EXIF of an image: the bytes of its file where it was not edited since, else written anew by Pillow."""
    if hasattr(image, "tag_v2") and "exif" not in image.info:
        return tiff.exif_of(image)
    current = image.getexif()
    raw = image.info.get("exif") or header.exif
    if isinstance(raw, bytes) and raw:
        loaded = Image.Exif()
        loaded.load(raw)
        if (not len(current) and header.exif) or _same(loaded, current):
            return raw
    return current.tobytes() if len(current) else None


def _same(raw: Image.Exif, current: Image.Exif) -> bool:
    """Whether an image's EXIF is that of its file; the orientation may come from elsewhere."""
    if _ORIENTATION in current and _ORIENTATION not in raw:
        raw[_ORIENTATION] = current[_ORIENTATION]
    return raw.tobytes() == current.tobytes()


def _exif(image: Image.Image, header: Header) -> bytes | None:
    """The EXIF without orientation and storage tags."""
    try:
        raw = _raw_exif(image, header)
        return exif_tags.cleaned(raw) if raw else None
    except PARSE_ERRORS as error:
        notice(f"EXIF is corrupt and was dropped ({error})")
        return None


def _exif_resized(data: bytes | None, width: int, height: int) -> bytes | None:
    if data is None:
        return None
    try:
        return exif_tags.resized(data, width, height)
    except PARSE_ERRORS as error:
        notice(f"EXIF is corrupt and was dropped ({error})")
        return None


def _xmp(image: Image.Image, header: Header) -> tuple[bytes | None, list[str]]:
    packet = image.info.get("xmp")
    packet = packet if isinstance(packet, bytes) and packet else image.info.get("XML:com.adobe.xmp")
    if packet is None and hasattr(image, "tag_v2"):
        packet = image.tag_v2.get(700)
    if isinstance(packet, str):
        packet = packet.encode("utf-8", "replace")
    if packet is None and isinstance(text := image.info.get(_RAW_PROFILE + "xmp"), str):
        packet = iptc_tags.from_png_text(text)
    packet = packet or header.xmp
    return xmp.clean(packet) if isinstance(packet, bytes) else (None, [])


def _iptc(image: Image.Image) -> bytes | None:
    """IPTC records: from Photoshop's resources in JPEG and PSD, from TIFF's tags, from a text in PNG."""
    found: Any = None
    photoshop: Any = image.info.get("photoshop")
    tags: Any = getattr(image, "tag_v2", {})
    if isinstance(photoshop, Mapping):
        found = photoshop.get(0x0404)
    elif hasattr(image, "resources"):
        found = next((data for kind, _, data in image.resources if kind == 0x0404), None)
    elif tags:
        found = tiff.iptc_of(tags)
    elif isinstance(text := image.info.get(_RAW_PROFILE + "iptc"), str):
        found = iptc_tags.from_png_text(text)
    return iptc_tags.without_raster(found) if isinstance(found, bytes) else None


def _texts(image: Image.Image) -> tuple[list[tuple[str, str]], list[str]]:
    """Texts of a PNG and comments of a JPEG, GIF or JPEG 2000, and what was too long."""
    found = []
    comments = [data for name, data in getattr(image, "applist", []) if name == "COM"] or [image.info.get("comment")]
    for comment in comments:
        if isinstance(comment, bytes):
            try:
                comment = comment.decode("utf-8")
            except UnicodeDecodeError:
                comment = comment.decode("latin-1")
        if isinstance(comment, str) and comment.strip("\0 ") and not comment.startswith(_SIGNATURES):
            found.append((COMMENT, comment.rstrip("\0")))
    if image.format in ("PNG", None):
        info = [(str(key), value) for key, value in image.info.items() if isinstance(value, str)]
        found += [(key, value) for key, value in info if key not in _NOT_TEXT]
    kept, lost, total = [], [], 0
    for key, value in found:
        if key.startswith(_RAW_PROFILE):
            if key.removeprefix(_RAW_PROFILE) not in _READ_PROFILES:
                lost.append(f"the text {key[:40]!r}")
        elif key in _TAKEN or not 1 <= len(key) <= 79 or total + len(value) > _MAX_TEXTS:
            lost.append(f"the text {key[:40]!r} ({len(value)} characters)")
        else:
            kept.append((key, value))
            total += len(value)
    return kept, lost


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    # Some readers report an unknown resolution as 1 dpi.
    return (x, y) if 1 < x < 1e6 and 1 < y < 1e6 else None


def _parts_lost(image: Image.Image) -> list[str]:
    """Parts of the file that describe other pixels than the result's, and have no place in it."""
    lost = []
    photoshop: Any = image.info.get("photoshop")
    if isinstance(photoshop, Mapping) and any(2000 <= key <= 2997 for key in photoshop):
        lost.append("Photoshop paths")
    for name, data in getattr(image, "applist", []):
        if name == "APP11" and data[:2] == b"JP":
            lost.append("Content Credentials (JUMBF)")
        if name == "APP2" and data.startswith(b"urn:iso:std:iso:ts:21496:-1"):
            lost.append(GAIN_MAP)
    auxiliary = image.info.get("aux")
    if isinstance(auxiliary, Mapping) and any("hdrgainmap" in str(kind) for kind in auxiliary):
        lost.append(GAIN_MAP)
    if isinstance(depth := image.info.get("depth_images"), list) and depth:
        lost.append("depth maps")
    if hasattr(image, "tag_v2"):
        lost += tiff.lost(image)
    return lost


def report_lost(parts: list[str], where: str) -> None:
    """One notice that names what was dropped, of bounded length. where: "from the file", "by JPEG"."""
    names = list(dict.fromkeys(parts))
    if names:
        more = f" and {len(names) - 6} more" if len(names) > 6 else ""
        notice(f"dropped {where}: {', '.join(names[:6])}{more}")


def collect(image: Image.Image, header: Header | None = None, *, mode: str | None = None) -> Metadata:
    """The metadata of an image. Load the image first: PNG may store metadata after the pixels.

    header: what `read_header` found in its file. mode: of the pixels, if they are not the image's own. The EXIF
    orientation is removed, because it is applied to the pixels. Corrupt parts, and those that only the old file can
    have, are dropped with a notice.
    """
    header = header or Header()
    exif = _exif(image, header)
    packet, lost = _xmp(image, header)
    texts, too_long = _texts(image)
    icc, label = declared_color(image, header, exif, gray=(mode or image.mode) in _GRAY_MODES)
    report_lost([*lost, *header.lost, *_parts_lost(image), *too_long], "with the old file")
    return Metadata(
        exif=exif,
        xmp=packet,
        icc=icc,
        dpi=_dpi(image),
        label=label,
        iptc=_iptc(image),
        texts=tuple(texts),
        modified=header.modified,
    )


def as_info(metadata: Metadata) -> dict[str | tuple[int, int], Any]:
    """The metadata as a PIL image's `info`, under the names that Pillow's readers give it; "cicp": a label."""
    fields: dict[str, Any] = {"icc_profile": metadata.icc, "exif": metadata.exif, "xmp": metadata.xmp}
    fields["dpi"] = metadata.dpi
    if metadata.label:
        fields["cicp"] = (metadata.label.primaries, metadata.label.transfer, 0, int(metadata.label.full_range))
    if metadata.iptc:
        fields["photoshop"] = {0x0404: metadata.iptc}
    info: dict[str | tuple[int, int], Any] = {key: value for key, value in fields.items() if value is not None}
    for key, text in metadata.texts:
        info.setdefault("comment" if key == COMMENT else key, text.encode() if key == COMMENT else text)
    return info
