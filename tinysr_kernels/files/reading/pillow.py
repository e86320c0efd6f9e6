"""Read the formats that Pillow decodes: opened from a list of accepted ones, checked, loaded with all their bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from tinysr_kernels.errors import InputError
from tinysr_kernels.files.reading.decoded import Decoded, damaged
from tinysr_kernels.files.reading.netpbm import read_ppm16
from tinysr_kernels.files.reading.png16 import can_load_16bit, load_16bit
from tinysr_kernels.files.reading.sniff import HEAD_BYTES, PILLOW_FORMATS, unknown_content
from tinysr_kernels.files.reading.truncated import PARTIAL_FORMATS, complete
from tinysr_kernels.runtime.images import structure
from tinysr_kernels.runtime.images.bounds import DECODE_ERRORS
from tinysr_kernels.runtime.images.pil import pick_frame
from tinysr_kernels.runtime.notices import notice

_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)  # SOF markers
_HIERARCHICAL = (0xC5, 0xC6, 0xCD, 0xCE)
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WebP",
    b"qoif": "QOI",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}

Check = Callable[[int, int], None]
"""Raises for an image that is too large; width and height in pixels."""


def read_pillow(path: Path, stream: BinaryIO, frame: int | None, check: Check, allow_truncated: bool) -> Decoded:
    """One image of a file. path: for messages. frame: its index, needed if the file has several.

    check: is called with the size before pixels are decoded. allow_truncated: decode damaged files as far as they go,
    with a notice. Raises InputError, and what Pillow raises when it opens damaged files.
    """
    if structure.read_at(stream, 0, 2) == b"P6":
        pixels = read_ppm16(stream, check, allow_truncated)
        if pixels is not None:
            return Decoded(pixels, _empty_carrier("PPM"))
    image = _open(path, stream)
    check(*image.size)
    form = image.format or "unknown"
    try:
        image = pick_frame(image, frame, str(path))
        check(*image.size)
        _notice_reduction(image, stream)
        return _load(image, lambda: _open(path, stream))
    except InputError:
        raise
    except DECODE_ERRORS as error:
        partial = form in PARTIAL_FORMATS and not frame
        if not (partial and allow_truncated):
            raise damaged(path, form, error, partial=partial) from error
    try:
        return _load_part(path, stream, form)
    except DECODE_ERRORS as error:
        raise damaged(path, form, error) from error


def _open(path: Path, stream: BinaryIO) -> Image.Image:
    """Open by content. Decodes nothing, except for icons."""
    Image.init()
    stream.seek(0)
    try:
        return Image.open(stream, formats=[name for name in PILLOW_FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        raise InputError(_undecodable(path, stream)) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; raise PIL.Image.MAX_IMAGE_PIXELS if the image is genuine") from error


def _load(image: Image.Image, reopen: Callable[[], Image.Image]) -> Decoded:
    """Load an opened image. reopen: opens the same file once more."""
    if can_load_16bit(image) and getattr(image, "n_frames", 1) == 1:
        return Decoded(load_16bit(image, reopen), image)
    image.load()
    key = image.info.get("transparency")
    if image.mode in ("I;16", "I;16B") and isinstance(key, int):
        # Pillow has no mode for 16-bit gray + alpha; an array keeps all bits.
        gray = np.asarray(image).astype(np.uint16)
        return Decoded(np.stack([gray, np.where(gray == key, 0, 65535).astype(np.uint16)], -1), image)
    return Decoded(image, image)


def _load_part(path: Path, stream: BinaryIO, form: str) -> Decoded:
    """Load what there is of a damaged file."""

    def load(file: BinaryIO) -> Image.Image:
        image = _open(path, file)
        image.load()
        return image

    whole, missing = complete(stream, form, load)
    decoded = _load(_open(path, whole), lambda: _open(path, whole))
    notice(f"the file is damaged or truncated: {missing} of {decoded.carrier.height} rows are missing or incomplete")
    return decoded


def _empty_carrier(form: str) -> Image.Image:
    carrier = Image.new("L", (1, 1))
    carrier.format = form
    return carrier


def _undecodable(path: Path, stream: BinaryIO) -> str:
    """What to say of a file that Pillow does not open."""
    head = structure.read_at(stream, 0, HEAD_BYTES)
    for magic, form in _MAGIC.items():
        if head.startswith(magic):
            return f"{path}: corrupt or truncated {form} file: its header cannot be read"
    if not head.startswith(b"\xff\xd8\xff"):
        return str(unknown_content(path, head))
    found = structure.jpeg(stream)
    if head[3] == 0xF7:
        kind = "a JPEG-LS image"
    elif found.frame_type in _LOSSLESS:
        kind = "a lossless JPEG (as in medical and raw files)"
    elif found.frame_type in _HIERARCHICAL:
        kind = "a hierarchical JPEG"
    elif found.frame_type and found.precision != 8:
        kind = f"a JPEG of {found.precision} bits per sample"
    elif found.frame_type and found.components not in (1, 3, 4):
        kind = f"a JPEG of {found.components} channels"
    else:
        return f"{path}: corrupt or truncated JPEG file: its header cannot be read"
    return f"{path}: {kind}; convert it to PNG or TIFF"


def _notice_reduction(image: Image.Image, stream: BinaryIO) -> None:
    """Say so if Pillow reduces the samples to 8 bits."""
    form, depth = image.format, 8
    if form == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA"):
        depth = _jpeg2000_depth(structure.read_at(stream, 0, 1 << 16))
    elif form == "AVIF":
        depth = _avif_depth(structure.read_at(stream, 0, 1 << 16))
    elif form == "SGI":
        depth = 8 * structure.read_at(stream, 3, 1)[0]
    elif form in ("PNG", "PPM") and image.mode not in ("I", "I;16"):
        depth = 16 if any(_is_wide(tile[3]) for tile in getattr(image, "tile", [])) and not can_load_16bit(image) else 8
        depth = 16 if form == "PNG" and getattr(image, "n_frames", 1) > 1 and can_load_16bit(image) else depth
    if depth > 8:
        notice(f"{form} with more than 8 bits per channel was read as 8 bits")


def _is_wide(arguments: object) -> bool:
    """Whether the arguments of a tile's decoder, a raw mode or a maximum, are of more than 8 bits."""
    if isinstance(arguments, str):
        return ";16" in arguments
    return isinstance(arguments, tuple) and isinstance(arguments[-1], int) and arguments[-1] > 255


def _jpeg2000_depth(head: bytes) -> int:
    """Bits per sample from the codestream's SIZ marker (ISO 15444-1, A.5.1); 8 if the marker is not found."""
    marker = head.find(b"\xff\x4f\xff\x51")
    return (head[marker + 42] & 0x7F) + 1 if marker >= 0 and marker + 42 < len(head) else 8


def _avif_depth(head: bytes) -> int:
    """Bits per sample from the decoder configuration (av1C; AV1 in ISOBMFF, 2.3.3); 8 if it is not found."""
    start = head.find(b"av1C")
    flags = head[start + 6] if 0 <= start < len(head) - 6 else 0
    return (12 if flags & 0x20 else 10) if flags & 0x40 else 8
