"""Image metadata: EXIF, XMP, ICC profile and resolution, and how they change with the image size."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, replace

from PIL import ExifTags, Image

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

_ORIENTATION = 0x0112
_PIXEL_X, _PIXEL_Y = 0xA002, 0xA003
# Tags that describe the storage of pixels in a TIFF, or that are handled separately (XMP 700, IPTC 33723, Photoshop
# 34377, ICC 34675). They must not be copied to another file.
_STORAGE_TAGS = frozenset(
    tag
    for first, last in (
        *((254, 259), (262, 266), (273, 274), (277, 281), (284, 284), (288, 293), (297, 297), (301, 301)),
        *((317, 325), (330, 330), (332, 341), (347, 347), (512, 521), (529, 532), (700, 700)),
        *((33723, 33723), (34377, 34377), (34675, 34675)),
    )
    for tag in range(first, last + 1)
)


@dataclass(frozen=True)
class Metadata:
    """Metadata of one image. None: absent.

    exif: with the "Exif\\0\\0" header, without orientation. xmp: the packet. icc: the profile. dpi: dots per inch in x
    and y.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None

    def resized(self, width: int, height: int) -> Metadata:
        """Metadata for a resized image: existing fields that state the size in pixels are updated."""
        return replace(self, exif=_exif_resized(self.exif, width, height), xmp=_xmp_resized(self.xmp, width, height))

    def stripped(self) -> Metadata:
        """Without EXIF, XMP and resolution. The ICC profile stays, because it defines the colors of the pixels."""
        return replace(self, exif=None, xmp=None, dpi=None)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if it is absent or unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except PARSE_ERRORS as error:
        notice(f"EXIF cannot be read, the orientation was not applied ({error})")
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _exif(image: Image.Image) -> bytes | None:
    """The EXIF of an image as bytes, without orientation and storage tags."""
    try:
        exif = Image.Exif()
        exif.load(image.getexif().tobytes())  # a copy, so that the image is not changed
        for tag in [tag for tag in exif if tag in _STORAGE_TAGS]:
            del exif[tag]
        return exif.tobytes() if len(exif) else None
    except PARSE_ERRORS as error:
        notice(f"EXIF is corrupt and was dropped ({error})")
        return None


def _exif_resized(data: bytes | None, width: int, height: int) -> bytes | None:
    if data is None:
        return None
    try:
        exif = Image.Exif()
        exif.load(data)
        detail = exif.get_ifd(ExifTags.IFD.Exif)
        for tag, value in ((_PIXEL_X, width), (_PIXEL_Y, height)):
            if tag in detail:
                detail[tag] = value
        return exif.tobytes()
    except PARSE_ERRORS as error:
        notice(f"EXIF is corrupt and was dropped ({error})")
        return None


def _xmp(image: Image.Image) -> bytes | None:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    if packet is None and hasattr(image, "tag_v2"):
        packet = image.tag_v2.get(700)
    if isinstance(packet, str):
        packet = packet.encode("utf-8", "replace")
    if not isinstance(packet, bytes) or not packet.strip(b"\0 \r\n\t"):
        return None
    return _xmp_field(packet, b"tiff:Orientation", 1)


def _xmp_resized(packet: bytes | None, width: int, height: int) -> bytes | None:
    if packet is None:
        return None
    for name in (b"tiff:ImageWidth", b"exif:PixelXDimension"):
        packet = _xmp_field(packet, name, width)
    for name in (b"tiff:ImageLength", b"exif:PixelYDimension"):
        packet = _xmp_field(packet, name, height)
    return packet


def _xmp_field(packet: bytes, name: bytes, value: int) -> bytes:
    """Set an existing number in the packet, stored as an attribute or as an element."""
    new = rb"\g<1>%d\g<2>" % value
    packet = re.sub(rb"""(\b%b\s*=\s*["'])\d+(["'])""" % name, new, packet)
    return re.sub(rb"(<%b>)\s*\d+\s*(</%b>)" % (name, name), rb"\g<1>%d\g<2>" % value, packet)


def _dpi(image: Image.Image) -> tuple[float, float] | None:
    try:
        x, y = (float(value) for value in image.info["dpi"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    # Some readers report an unknown resolution as 1 dpi.
    return (x, y) if 1 < x < 1e6 and 1 < y < 1e6 else None


def collect(image: Image.Image) -> Metadata:
    """The metadata of an image. Load the image first: PNG may store metadata after the pixels.

    The EXIF orientation is removed, because it is applied to the pixels. Corrupt parts are dropped with a notice.
    """
    icc = image.info.get("icc_profile")
    return Metadata(
        exif=_exif(image),
        xmp=_xmp(image),
        icc=icc if isinstance(icc, bytes) and icc else None,
        dpi=_dpi(image),
    )
