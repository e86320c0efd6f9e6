"""Edit XMP packets: fields that state the size follow it, fields about other parts of the old file go.

The packet is edited as text, so that everything else, its padding and unknown schemas included, stays as it is.
"""

from __future__ import annotations

import re

GAIN_MAP = "the HDR gain map (the result is the SDR image)"
_EMPTY = b"\0 \r\n\t"
_MAX_BYTES = 16 << 20
_MAX_NAMES = 100
# Attributes and elements about things that only the old file holds: gain maps, motion photos, the rest of a packet that
# a JPEG segment could not hold, previews. Adobe's "hdrgm" and Apple's "HDRGainMap" describe gain maps (ISO 21496-1).
_GAIN_MAP = rb"(?:hdrgm|HDRGainMap):\w+"
_MOTION = rb"GCamera:(?:Micro|Motion)\w+"
_ATTRIBUTES = re.compile(rb"""\s(?:%b|%b|xmpNote:HasExtendedXMP)\s*=\s*("[^"]*"|'[^']*')""" % (_GAIN_MAP, _MOTION))
_ELEMENTS = re.compile(rb"<(%b|%b|G?Container:Directory|x[am]p:Thumbnails)[\s/>]" % (_GAIN_MAP, _MOTION))
_PANORAMA = [
    b"GPano:" + name + b"Pixels"
    for name in (
        *(b"FullPanoWidth", b"FullPanoHeight", b"CroppedAreaImageWidth", b"CroppedAreaImageHeight"),
        *(b"CroppedAreaLeft", b"CroppedAreaTop"),
    )
]


def clean(packet: bytes) -> tuple[bytes | None, list[str]]:
    """The packet of an upright image without what does not outlive the old file, and the names of what was lost.

    None for an empty packet, and for one that is absurdly long.
    """
    packet = packet.rstrip(b"\0")
    if not packet.strip(_EMPTY):
        return None, []
    names = {match[1] for match in _ELEMENTS.finditer(packet)} if len(packet) <= _MAX_BYTES else set()
    if len(packet) > _MAX_BYTES or len(names) > _MAX_NAMES:
        return None, [f"XMP ({len(packet)} bytes)"]
    lost = []
    if re.search(_GAIN_MAP, packet):
        lost.append(GAIN_MAP)
    if re.search(rb"GCamera:M(?:icroVideo|otionPhoto)\b", packet):
        lost.append("the film of a motion photo")
    if b"xmpNote:HasExtendedXMP" in packet:
        lost.append("extended XMP")
    packet = _ATTRIBUTES.sub(b"", packet)
    for name in sorted(names):
        packet = _without_element(packet, name)
    return set_number(packet, b"tiff:Orientation", 1), lost


def _without_element(packet: bytes, name: bytes) -> bytes:
    """Remove all elements of this name; one that is not closed stays."""
    kept = []
    position = 0
    for match in re.finditer(rb"<%b(?=[\s/>])" % name, packet):
        if match.start() < position:
            continue
        tag_end = packet.find(b">", match.end())
        end = tag_end + 1 if packet[tag_end - 1 : tag_end] == b"/" else packet.find(b"</%b>" % name, tag_end)
        if tag_end < 0 or end < 0:
            break
        kept.append(packet[position : match.start()])
        position = end if packet[tag_end - 1 : tag_end] == b"/" else end + len(name) + 3
    return b"".join(kept) + packet[position:]


def resized(packet: bytes, width: int, height: int) -> bytes:
    """With existing fields that state the size in pixels updated; those of panoramas (GPano) are scaled."""
    cropped = _number(packet, b"GPano:CroppedAreaImageWidthPixels")
    for name in _PANORAMA if cropped else []:
        packet = set_number(packet, name, round((_number(packet, name) or 0) * width / (cropped or 1)))
    names = [(b"tiff:ImageWidth", width), (b"exif:PixelXDimension", width)]
    names += [(b"tiff:ImageLength", height), (b"exif:PixelYDimension", height)]
    if b"AppliedToDimensions" in packet:  # of face regions, which themselves are relative
        names += [(b"stDim:w", width), (b"stDim:h", height)]
    for name, value in names:
        packet = set_number(packet, name, value)
    return packet


def _number(packet: bytes, name: bytes) -> int | None:
    match = re.search(rb"""\b%b\s*(?:=\s*["']|>)\s*(\d{1,9})\b""" % name, packet)
    return int(match[1]) if match else None


def set_number(packet: bytes, name: bytes, value: int) -> bytes:
    """Set an existing number in the packet, stored as an attribute or as an element."""
    new = rb"\g<1>%d\g<2>" % value
    packet = re.sub(rb"""(\b%b\s*=\s*["'])\d+(["'])""" % name, new, packet)
    return re.sub(rb"(<%b>)\s*\d+\s*(</%b>)" % (name, name), new, packet)
