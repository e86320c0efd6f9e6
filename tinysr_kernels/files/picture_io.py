"""Picture files: read by content, checked by their header first; written whole or not at all.

Reading keeps 16 bits where PNG and TIFF hold them (sixteen.py). Writing chooses the format by suffix and keeps EXIF,
XMP, ICC profile and resolution. Nothing here knows of networks except `upscale_picture`, which joins the two sides.
"""

from __future__ import annotations

import os
import secrets
import stat
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.files.bit16 import drops_bits, load_sixteen, readable
from tinysr_kernels.files.encode import Encoding, encode
from tinysr_kernels.runtime.device.host_memory import check_size
from tinysr_kernels.runtime.images import metadata as meta
from tinysr_kernels.runtime.images.arrays import Enlarge, enlarge_pixels
from tinysr_kernels.runtime.images.metadata import Metadata
from tinysr_kernels.runtime.images.pil import colour_space, pick_frame, upscale_loaded
from tinysr_kernels.runtime.notices import notice

# Formats that Pillow hands to other programs or system libraries, or that hold no pixels: never opened.
_REFUSED = frozenset(["BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "PDF", "WMF"])

# What Pillow's decoders raise on damaged data, beside the metadata parsers' errors.
DECODE_ERRORS = (*meta.PARSE_ERRORS, EOFError, MemoryError, RuntimeError, AssertionError, zlib.error)

_HINTS = (
    (b"%PDF", "a PDF document; render its pages to pictures first"),
    (b"%!PS", "a PostScript file; render it to a picture first"),
    (b"<svg", "an SVG drawing; it can be rendered at any size"),
    (b"PK\x03\x04", "a ZIP archive; unpack it first"),
    (b"\xff\x0a", "a JPEG XL picture; convert it to PNG first"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL picture; convert it to PNG first"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"heim", b"heis")


@dataclass(frozen=True)
class Picture:
    """A decoded file. image: a PIL image, or uint16 [H,W,2|3|4] for 16-bit colour; oriented as it is to be seen.

    size: (width, height). mode: Pillow's mode, with ";16" behind it for 16-bit colour. frame: the one taken.
    """

    image: Image.Image | np.ndarray
    metadata: Metadata
    size: tuple[int, int]
    mode: str
    format: str


def unknown_content(path: Path, head: bytes) -> InputError:
    """The error for a file that no decoder knows, saying what it seems to be."""
    if not head:
        return InputError(f"{path}: the file is empty")
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return InputError(f"{path}: a HEIC picture; convert it to JPEG or PNG first")
    for start, what in _HINTS:
        if start in head[:64]:
            return InputError(f"{path}: {what}")
    if _is_text(head):
        return InputError(f"{path}: not an image but text, beginning with {head[:24].decode(errors='replace')!r}")
    return InputError(
        f"{path}: not an image, or of a format that Pillow cannot read (begins with {head[:12].hex(' ')})"
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # the end may lie inside a character
            return False
        text = head[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter in "\t\r\n\f\ufeff" for letter in text)


def _open(path: Path, frame: int | None, max_pixels: int | None, upscale: int) -> Image.Image:
    """Open by content, check the header, go to the frame; no pixel is decoded yet (but see GIF and WebP)."""
    Image.init()
    formats = [name for name in Image.ID if name not in _REFUSED]
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            head = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        image = Image.open(path, formats=formats)
    except UnidentifiedImageError as error:
        raise unknown_content(path, head) from error
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: {error}; set PIL.Image.MAX_IMAGE_PIXELS if the picture is genuine") from error
    except DECODE_ERRORS as error:
        raise InputError(f"{path}: broken: {error or type(error).__name__}") from error
    try:
        check_size(image.width, image.height, upscale, max_pixels=max_pixels, name=str(path))
        return pick_frame(image, frame, str(path))
    except TinySRError:
        image.close()
        raise
    except DECODE_ERRORS as error:
        image.close()
        raise InputError(f"{path}: broken {image.format} file: {error or type(error).__name__}") from error


def read_picture(
    path: str | os.PathLike[str], *, frame: int | None = None, max_pixels: int | None = None, upscale: int = 4
) -> Picture:
    """Read one picture file, whatever its suffix says.

    frame: which one of several, from 0; without it a file of several frames is refused. max_pixels: the limit on
    width * height; None lets the memory that is free decide, for a result enlarged `upscale` times.
    Raises InputError naming the file and the reason, OutOfMemory where the result cannot fit.
    """
    path = Path(path)
    with _open(path, frame, max_pixels, upscale) as image:
        sixteen = readable(image) and (image.format == "TIFF" or getattr(image, "n_frames", 1) == 1)
        if not sixteen and drops_bits(image):
            notice(f"{image.format} with more than 8 bits a channel was read as 8 bits")
        form = image.format or "unknown"
        try:
            if sixteen:
                return _sixteen_picture(image, load_sixteen(image, lambda: _open(path, frame, max_pixels, upscale)))
            image.load()
            key = image.info.get("transparency")
            if image.mode in ("I;16", "I;16B") and isinstance(key, int):
                # Pillow has no mode for 16-bit grey with alpha; an array keeps all bits.
                grey = np.asarray(image).astype(np.uint16)
                alpha = np.where(grey == key, 0, 65535).astype(np.uint16)
                return _sixteen_picture(image, np.stack([grey, alpha], -1))
            metadata = meta.collect(image)
            turned = ImageOps.exif_transpose(image) if meta.orientation(image) != 1 else image.copy()
        except TinySRError:
            raise
        except DECODE_ERRORS as error:
            raise InputError(f"{path}: broken or truncated {form} file: {error or type(error).__name__}") from error
        return Picture(turned, metadata, turned.size, turned.mode, form)


def _sixteen_picture(image: Image.Image, pixels: np.ndarray) -> Picture:
    """uint16 pixels with the metadata of the file they came from; the orientation is applied (Pillow has for TIFF)."""
    oriented = _oriented(pixels, meta.orientation(image))
    mode = {2: "LA", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    size = (oriented.shape[1], oriented.shape[0])
    return Picture(oriented, meta.collect(image), size, f"{mode};16", image.format or "unknown")


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H,W,C] as stored -> as it is to be seen (EXIF 2.32, tag 0x0112)."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def upscale_picture(
    picture: Picture, enlarge: Enlarge, upscale: int, *, device: torch.device | str | None = None
) -> tuple[Image.Image | np.ndarray, Metadata]:
    """Enlarge a picture through the same path as every other image -> the new image and its metadata."""
    image = picture.image
    metadata = picture.metadata.resized(picture.size[0] * upscale, picture.size[1] * upscale)
    if isinstance(image, np.ndarray):
        space, tables = colour_space(metadata.icc)
        if tables:
            notice("an ICC profile of tables cannot be applied to 16 bits; the pixels were taken for sRGB")
        return enlarge_pixels(image[None], enlarge, upscale, device=device, space=space)[0], metadata
    result, metadata = upscale_loaded(image, metadata, enlarge, upscale, device=device)
    return result, metadata


def write_picture(
    path: str | os.PathLike[str],
    image: Image.Image | np.ndarray,
    metadata: Metadata | None = None,
    encoding: Encoding | None = None,
) -> None:
    """Encode an image in the format of the suffix and put it in place in one step.

    image: a PIL image, or uint8 or uint16 [H,W,1..4]. Raises InputError for a suffix that cannot be written or a
    picture outside the format's limits, OSError where the disk refuses. A file that was there before stays
    untouched unless the new one is complete.
    """
    path = Path(path)
    data = encode(image, path.suffix, metadata or Metadata(), encoding or Encoding())
    write_bytes(path, data)


def temporary_beside(path: Path) -> Path:
    """A free hidden name in the same folder, so that renaming it to `path` is one step of the file system."""
    return path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.part")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file so that it appears whole or not at all, also if interrupted. Raises OSError."""
    path = Path(os.path.realpath(path))  # a link stays a link
    temporary = temporary_beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
