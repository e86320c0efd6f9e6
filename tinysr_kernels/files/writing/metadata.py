"""Where each output format keeps metadata: what has an obvious home is moved there, the rest is named in one notice.

PNG keeps everything. JPEG, WebP, TIFF and AVIF keep texts in EXIF: prompts ("parameters") and comments as UserComment,
as image generators do, others under the tag of the same meaning. IPTC: JPEG, PNG and TIFF. BMP keeps the resolution.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

from PIL import PngImagePlugin

from tinysr_kernels.runtime.images.metadata import COMMENT, PARSE_ERRORS, Metadata, report_lost
from tinysr_kernels.runtime.images.tags import exif, iptc
from tinysr_kernels.runtime.notices import notice

_MARKER_LIMIT = 65533 - 29  # a JPEG segment minus the longest header that EXIF and XMP put in it
_HOMES = {
    "parameters": exif.USER_COMMENT,
    COMMENT: exif.USER_COMMENT,
    "Description": exif.DESCRIPTION,
    "Software": exif.SOFTWARE,
    "Author": exif.ARTIST,
    "Copyright": exif.COPYRIGHT,
}


def fitted(metadata: Metadata, form: str) -> Metadata:
    """The metadata as a file of this format can keep it. form: Pillow's name of the format.

    One notice names what is lost.
    """
    if form == "PNG":
        return metadata
    lost = []
    if form == "BMP":
        present = {"EXIF": metadata.exif, "XMP": metadata.xmp, "IPTC": metadata.iptc}
        lost = [name for name, value in present.items() if value] + [repr(key[:40]) for key, _ in metadata.texts]
        report_lost(lost, "because BMP cannot store it")
        return Metadata(icc=metadata.icc, dpi=metadata.dpi, label=metadata.label)
    if form == "JPEG":
        metadata = _within_segments(metadata)
    metadata, lost = _texts_in_exif(metadata, form)
    if metadata.iptc and form not in ("JPEG", "TIFF"):
        lost.append("IPTC")
        metadata = replace(metadata, iptc=None)
    report_lost(lost, f"because {form} cannot store it")
    return metadata


def _within_segments(metadata: Metadata) -> Metadata:
    """Without EXIF, XMP or IPTC that is too long for a JPEG segment, with notices."""

    def short(name: str, value: bytes | None) -> bytes | None:
        if value and len(value) > _MARKER_LIMIT:
            notice(f"{name} is too long for JPEG and was dropped")
            return None
        return value

    return replace(
        metadata,
        exif=short("EXIF", metadata.exif),
        xmp=short("XMP", metadata.xmp),
        iptc=short("IPTC", metadata.iptc),
    )


def _texts_in_exif(metadata: Metadata, form: str) -> tuple[Metadata, list[str]]:
    """Texts moved into EXIF tags that are free (JPEG: comments stay), and the names of those that are not kept."""
    added: dict[int, str] = {}
    kept, lost = [], []
    room = _MARKER_LIMIT - len(metadata.exif or b"") - 200 if form == "JPEG" else None
    for key, text in metadata.texts:
        tag = _HOMES.get(key)
        if form == "JPEG" and key == COMMENT and len(text.encode()) <= _MARKER_LIMIT:
            kept.append((key, text))
            continue
        present = added.get(tag) or _present(metadata, tag) if tag else None
        if present == text:
            continue
        size = 2 * len(text) + 20
        if tag is None or present or (room is not None and size > room):
            lost.append(repr(key[:40]))
        else:
            added[tag] = text
            room = None if room is None else room - size
    if metadata.modified and not _present(metadata, exif.DATE):
        added[exif.DATE] = "{:04}:{:02}:{:02} {:02}:{:02}:{:02}".format(*struct.unpack(">H5B", metadata.modified))
    packed = exif.with_texts(metadata.exif, added) if added else metadata.exif
    return replace(metadata, exif=packed, texts=tuple(kept), modified=None), lost


def _present(metadata: Metadata, tag: int) -> str | None:
    try:
        return exif.read_text(metadata.exif, tag) if metadata.exif else None
    except PARSE_ERRORS:
        return None


def png_chunks(metadata: Metadata) -> list[tuple[bytes, bytes]]:
    """The ancillary chunks of a PNG, in order, except ICC profile, EXIF and resolution, which Pillow writes."""
    found = []
    if metadata.label:
        found.append(
            (b"cICP", bytes([metadata.label.primaries, metadata.label.transfer, 0, metadata.label.full_range]))
        )
    if metadata.modified:
        found.append((b"tIME", metadata.modified))
    info = PngImagePlugin.PngInfo()
    for key, text in metadata.texts:
        info.add_text(key, text)
    if metadata.iptc:
        info.add_text("Raw profile type iptc", iptc.to_png_text(metadata.iptc), zip=True)
    found += [chunk[:2] for chunk in info.chunks]
    if metadata.xmp:
        found.append((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp))
    return found


def save_options(metadata: Metadata, form: str) -> dict[str, Any]:
    """Pillow's options for `Image.save` that write metadata which `fitted` returned."""
    if form == "BMP":
        options: dict[str, Any] = {"dpi": metadata.dpi}
    else:
        options = {"exif": metadata.exif, "icc_profile": metadata.icc, "dpi": metadata.dpi}
    if form == "PNG":
        info = PngImagePlugin.PngInfo()
        for name, data in png_chunks(metadata):
            info.add(name, data)
        options["pnginfo"] = info
    elif form != "BMP":
        options["xmp"] = metadata.xmp
    if form == "JPEG":
        options["extra"] = _jpeg_segments(metadata)
    return {key: value for key, value in options.items() if value}


def _jpeg_segments(metadata: Metadata) -> bytes:
    """IPTC and comments as segments."""
    segments = iptc.jpeg_segment(metadata.iptc) if metadata.iptc else b""
    for _, text in metadata.texts:
        data = text.encode()
        segments += b"\xff\xfe" + struct.pack(">H", len(data) + 2) + data
    return segments


def stamp_avif(data: bytes, metadata: Metadata) -> bytes:
    """An AVIF file with the label's code points in its first color box, which Pillow cannot set.

    That box overrides what the AV1 stream states (ISO 23000-22, 7.3.6.4).
    """
    at = data.find(b"colrnclx")
    if metadata.label is None or at < 0:
        return data
    points = struct.pack(">HH", metadata.label.primaries, metadata.label.transfer)
    return data[: at + 8] + points + data[at + 12 :]
