"""Read the formats that Pillow decodes: opened from a list of accepted ones, checked, loaded with all their bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.files.reading.decoded import Decoded, damaged, notice_missing
from tinysr_kernels.files.reading.netpbm import read_ppm16
from tinysr_kernels.files.reading.png16 import can_load_16bit, load_16bit
from tinysr_kernels.files.reading.sniff import HEAD_BYTES, PILLOW_FORMATS, unknown_content
from tinysr_kernels.files.reading.truncated import PARTIAL_FORMATS, complete
from tinysr_kernels.runtime.images import structure
from tinysr_kernels.runtime.images.bounds import DECODE_ERRORS, misread_jpeg2000
from tinysr_kernels.runtime.images.pil import pick_frame
from tinysr_kernels.runtime.notices import notice

_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)  # SOF markers
_DEPTH = "bits per sample"  # in an image's info, between opening and loading
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
        try:
            pixels = read_ppm16(stream, check, allow_truncated)
        except OSError as error:
            raise damaged(path, "PPM", error, partial=True) from error
        if pixels is not None:
            return Decoded(pixels, _empty_carrier("PPM"))
    image = _open(path, stream)
    check(*image.size)
    form = image.format or "unknown"
    try:
        image = pick_frame(image, frame, str(path))
        check(*image.size)
        if form == "JPEG2000":
            _check_jpeg2000(path, image, stream, check)
        _notice_reduction(image, stream)
        return _load(image, lambda: _open(path, stream))
    except TinySRError:
        raise
    except DECODE_ERRORS as error:
        partial = form in PARTIAL_FORMATS and not frame
        if not (partial and allow_truncated):
            raise damaged(path, form, error, partial=partial) from error
    try:
        return _load_part(path, stream, form)
    except TinySRError:
        raise
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
    depth = image.info.pop(_DEPTH, 16)
    if depth < 16:
        return Decoded(_full_range(image, depth), image)
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        # Adobe's files hold inverted inks and are marked. Pillow inverts all, other readers the marked ones.
        return Decoded(ImageChops.invert(image), image)
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
    notice_missing(missing, decoded.carrier.height)
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
    if found.frame_type == 0xF7:
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
    if form == "AVIF":
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


def _check_jpeg2000(path: Path, image: Image.Image, stream: BinaryIO, check: Check) -> None:
    """Check what the codestream states, which is what is decoded: its size, and depths that Pillow reads rightly.

    Pillow rounds samples of more than 8 bits beyond the largest value, so that white becomes black. It shifts gray
    samples up to 16 bits and others up to 8; `_full_range` stretches them.
    """
    found = structure.jpeg2000(stream)
    if found is None:
        return
    check(found.width, found.height)
    if image.mode == "I;16":
        image.info[_DEPTH] = found.depth
    elif misread_jpeg2000(image, found):
        raise InputError(
            f"{path}: a JPEG 2000 image of {found.depth} bits ({image.mode}); convert it to 16-bit PNG or TIFF"
        )


def _full_range(image: Image.Image, depth: int) -> Image.Image:
    """Mode I;16 with values of `depth` bits shifted up -> 0 to 65535."""
    top = (1 << depth) - 1
    values = np.asarray(image).astype(np.uint32) >> 16 - depth
    stretched = Image.fromarray(((values * 65535 + top // 2) // top).astype(np.uint16))
    stretched.info = image.info
    return stretched


def _avif_depth(head: bytes) -> int:
    """Bits per sample from the decoder configuration (av1C; AV1 in ISOBMFF, 2.3.3); 8 if it is not found."""
    start = head.find(b"av1C")
    flags = head[start + 6] if 0 <= start < len(head) - 6 else 0
    return (12 if flags & 0x20 else 10) if flags & 0x40 else 8
