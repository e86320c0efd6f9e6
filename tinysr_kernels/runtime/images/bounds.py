"""Bounds on memory and time, checked before an image is decoded.

A header of a few bytes can state any size, and a small file can hold thousands of scans or frames, each of which costs
a pass over all pixels. The size that counts is that of the parts which are decoded: an icon's own images, a GIF's
frames beyond its canvas.
"""

from __future__ import annotations

import struct
import zlib
from itertools import islice
from typing import BinaryIO

from PIL import Image

from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.device.host_memory import available_memory, check_size
from tinysr_kernels.runtime.images import structure
from tinysr_kernels.runtime.images.metadata import PARSE_ERRORS

# Passes over pixels that decoding may take: about 10 seconds of a core (progressive JPEG: 6e8 pixels per second).
MAX_WORK = 1 << 32
# Scans that are always accepted. Encoders write about 10; libjpeg's own advice is to distrust more than 500.
_USUAL_SCANS = 64
_MAX_CHUNKS = 1 << 20
_ALWAYS_DECODED = 1 << 24  # pixels
_DECODED_BYTES = 4  # per pixel


# What decoders raise on damaged data, in addition to the errors of metadata parsers.
DECODE_ERRORS = (*PARSE_ERRORS, EOFError, MemoryError, RuntimeError, AssertionError, zlib.error)


def pillow_limit(max_pixels: int | None) -> int | None:
    """A value for PIL.Image.MAX_IMAGE_PIXELS that is no narrower than the checks of this module; None: no limit.

    Pillow refuses images of twice as many pixels, and so does each part of a file that it opens by itself.
    """
    if max_pixels is not None:
        return max_pixels
    free = available_memory()
    return None if free is None else max(_ALWAYS_DECODED, free // (2 * _DECODED_BYTES))


def check_opened(image: Image.Image, upscale: int, *, frame: int | None = None, max_pixels: int | None = None) -> None:
    """The checks of `check_structure` for an image that Pillow has opened and may not have decoded yet.

    Raises InputError also for TIFF and JPEG 2000 files whose pixels Pillow reads wrongly.
    """
    stream = getattr(image, "fp", None)
    if stream is None or getattr(stream, "closed", False):
        return
    check_structure(stream, "image", upscale, frame=frame, max_pixels=max_pixels)
    if image.format == "JPEG2000":
        position = stream.tell()
        found = structure.jpeg2000(stream)
        stream.seek(position)
        if misread_jpeg2000(image, found):
            raise InputError("Pillow reads a JPEG 2000 image of this depth wrongly; convert it to 16-bit PNG or TIFF")
    tags = getattr(image, "tag_v2", None)
    if tags is None or max(tags.get(258, (1,))) in (1, 2, 4, 8):
        return
    if tags.get(284) == 2 or tags.get(262) == 0 or max(tags.get(258, (1,))) % 8:
        raise InputError(
            "Pillow reads this TIFF image (of more than 8 bits, in planes, inverted or packed) wrongly; "
            "open it with tifffile and pass the array, or use the command: tinysr upscale"
        )


def misread_jpeg2000(image: Image.Image, found: structure.Jpeg2000 | None) -> bool:
    """Whether Pillow rounds samples beyond the largest value, so that white becomes black. found: the codestream's."""
    return found is not None and found.depth != 8 and image.mode in ("L", "LA", "RGB", "RGBA")


def check_structure(
    stream: BinaryIO, name: str, upscale: int, *, frame: int | None = None, max_pixels: int | None = None
) -> None:
    """Check what decoding an image file would cost. The stream's position is kept.

    frame: the one that will be decoded; None for the first. upscale, max_pixels: see `check_size`. Raises InputError
    for a file that would take too much time, and what check_size raises.
    """
    position = stream.tell()
    try:
        head = structure.read_at(stream, 0, 32).ljust(32, b"\0")
        if head.startswith(b"\xff\xd8\xff"):
            _check_jpeg(stream, name)
        elif head.startswith(b"\x89PNG\r\n\x1a\n"):
            _check_png(stream, name, frame or 0)
        elif head.startswith((b"GIF87a", b"GIF89a")):
            frames = islice(structure.gif_frames(stream), (frame or 0) + 1)
            width, height = (max(sides) for sides in zip(struct.unpack("<HH", head[6:10]), *frames, strict=True))
            check_size(width, height, upscale, max_pixels=max_pixels, name=name)
            _check_frames(width * height, frame or 0, name)
        elif head.startswith(b"RIFF") and head[8:16] == b"WEBPVP8X":
            width, height = (1 + int.from_bytes(head[start : start + 3], "little") for start in (24, 27))
            check_size(width, height, upscale, max_pixels=max_pixels, name=name)
            _check_frames(width * height, frame or 0, name)
        elif head.startswith(b"\0\0\1\0"):
            for width, height in structure.icon_sizes(stream):
                check_size(width, height, upscale, max_pixels=max_pixels, name=name)
        elif head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            structure.tiff_directories(stream, ())
    except structure.DirectoryError as error:
        raise InputError(f"{name}: {error}") from error
    finally:
        stream.seek(position)


def _check_jpeg(stream: BinaryIO, name: str) -> None:
    found = structure.jpeg(stream)
    if found.scans > _USUAL_SCANS and found.scans * found.width * found.height > MAX_WORK:
        raise InputError(
            f"{name}: a JPEG file of {found.scans} scans, each a pass over {found.width}x{found.height} pixels; "
            "if it is genuine, save it again as an ordinary JPEG or PNG"
        )


def _check_png(stream: BinaryIO, name: str, frame: int) -> None:
    pixels = 0
    for count, (chunk, offset, _) in enumerate(structure.png_chunks(stream)):
        if chunk == b"IHDR":
            width, height = struct.unpack(">II", structure.read_at(stream, offset, 8).ljust(8, b"\0"))
            pixels = width * height
        if count == _MAX_CHUNKS:
            raise InputError(f"{name}: a PNG file of more than {_MAX_CHUNKS} chunks; save it again")
    _check_frames(pixels, frame, name)


def _check_frames(pixels: int, frame: int, name: str) -> None:
    """Frame N of an animation is drawn over the N frames before it."""
    if frame and (frame + 1) * pixels > MAX_WORK // 4:
        raise InputError(
            f"{name}: frame {frame} is drawn over all frames before it, too many of {pixels} pixels; "
            "save the frame as an image of its own"
        )
