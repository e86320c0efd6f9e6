"""What a file is, from its first bytes: an image, a film, or neither. Suffixes only tell what it claims to be."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tinysr_kernels.errors import InputError
from tinysr_kernels.files.encode import FORMATS
from tinysr_kernels.files.video import VIDEO_SUFFIXES, probe_video

IMAGE_SUFFIXES = frozenset(
    (
        *FORMATS,
        *(".gif", ".apng", ".jfif", ".jpe", ".dib", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".psd"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".ico", ".icns", ".pcx", ".sgi", ".qoi", ".exr", ".hdr"),
        *(".dds", ".fits", ".dng", ".nef", ".arw", ".cr2", ".cr3", ".raf", ".rw2", ".orf", ".pef", ".srw"),
    )
)
FILM_SUFFIXES = frozenset(
    (
        *VIDEO_SUFFIXES,
        *(".avi", ".wmv", ".asf", ".mts", ".m2ts", ".mpg", ".mpeg", ".vob", ".flv", ".ogv", ".3gp", ".3g2", ".mxf"),
        *(".ivf", ".y4m"),
    )
)
DOCUMENT_SUFFIXES = (".svg", ".pdf", ".eps", ".ai")

# The first bytes of what can be written, with the suffix it gets where its own tells nothing; None for other images.
_SIGNATURES: tuple[tuple[bytes, str | None], ...] = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG\r\n\x1a\n", ".png"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"II+\0", ".tif"),
    (b"MM\0+", ".tif"),
    (b"GIF8", None),
    (b"8BPS", None),
    (b"qoif", None),
    (b"v/1\x01", None),
    (b"\0\0\x01\0", None),
    (b"\xff\x0a", None),
    (b"\0\0\0\x0cJXL ", None),
    (b"\0\0\0\x0cjP  ", None),
    (b"\xff\x4f\xff\x51", None),
)
_AVIF_BRANDS = (b"avif", b"avis")
_IMAGE_BRANDS = (*_AVIF_BRANDS, b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"crx ", b"jxl ")
_ASF = b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"


@dataclass(frozen=True)
class Content:
    """What a file is. kind: "image", "film", or None for neither. suffix: of images in a format that can be written."""

    kind: Literal["image", "film"] | None
    suffix: str | None = None


def is_video(head: bytes) -> bool:
    """Whether the first 64 bytes of a file are those of a film in one of the common containers."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in _IMAGE_BRANDS
    return (
        head[:4] in (b"\x1aE\xdf\xa3", b"FLV\x01", b"OggS", b"\0\0\1\xba", b"\0\0\1\xb3")
        or head.startswith(_ASF)
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or (head[:1] == b"\0" and head[4:8] in (b"moov", b"mdat", b"wide"))
        or (head[:1] == b"G" and head[1:2] in (b"\x40", b"\x41") and b"\0" in head)
    )


def _image(head: bytes) -> Content | None:
    for start, suffix in _SIGNATURES:
        if head.startswith(start):
            return Content("image", suffix)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return Content("image", ".webp")
    if head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS:
        return Content("image", ".avif" if head[8:12] in _AVIF_BRANDS else None)
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return Content("image", ".bmp")
    if head[:1] == b"P" and head[1:2] in b"1234567" and head[2:3] in (b"\n", b" ", b"\t", b"\r"):
        return Content("image")
    return None


def _first_bytes(path: Path) -> bytes:
    """Up to 64 bytes; a FIFO or a device that has taken the file's place neither blocks nor is read."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError("not a regular file")
        return file.read(64)


def claims_to_be(path: Path) -> Literal["image", "film"] | None:
    """What the suffix says."""
    suffix = path.suffix.lower()
    return "image" if suffix in IMAGE_SUFFIXES else "film" if suffix in FILM_SUFFIXES else None


def recognize(path: Path) -> Content:
    """What a file is. What has neither an image's nor a film's first bytes is offered to PyAV, where that is installed.

    Raises InputError without the path for what is no regular file, OSError for what cannot be read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a device may do things
        raise InputError("not a regular file")
    head = _first_bytes(path)
    found = _image(head)
    if found is not None:
        return found
    if is_video(head):
        return Content("film")
    if head and claims_to_be(path) != "image" and probe_video(path):
        return Content("film")
    return Content(None)
