"""Read and write image files. The format of an input is detected from its content; outputs are written atomically.

The header is checked against size limits before pixels are decoded. Reading keeps 16 bits per sample of PNG and TIFF
(reading/bit16.py). Writing chooses the format by suffix and keeps EXIF, XMP, ICC profile and resolution.
`upscale_image_file` connects both to the network.
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
from tinysr_kernels.files.encode import Encoding, encode
from tinysr_kernels.files.reading.bit16 import can_load_16bit, drops_bits, load_16bit
from tinysr_kernels.runtime.device.host_memory import check_size
from tinysr_kernels.runtime.images import metadata as meta
from tinysr_kernels.runtime.images.arrays import Enlarge, enlarge_pixels
from tinysr_kernels.runtime.images.metadata import Metadata
from tinysr_kernels.runtime.images.pil import color_space, pick_frame, upscale_loaded
from tinysr_kernels.runtime.notices import notice

# Formats that Pillow passes to other programs or system libraries, or that contain no pixels: never opened.
_REFUSED = frozenset(["BUFR", "EPS", "FPX", "GRIB", "HDF5", "MIC", "MPEG", "PDF", "WMF"])

# What Pillow's decoders raise on damaged data, in addition to the errors of metadata parsers.
DECODE_ERRORS = (*meta.PARSE_ERRORS, EOFError, MemoryError, RuntimeError, AssertionError, zlib.error)

_HINTS = (
    (b"%PDF", "a PDF document; render its pages to images first"),
    (b"%!PS", "a PostScript file; render it to an image first"),
    (b"<svg", "an SVG drawing; render it at the wanted size instead"),
    (b"PK\x03\x04", "a ZIP archive; unpack it first"),
    (b"\xff\x0a", "a JPEG XL image; convert it to PNG first"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image; convert it to PNG first"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"heim", b"heis")


@dataclass(frozen=True)
class LoadedImage:
    """A decoded image file, with the EXIF orientation applied.

    image: a PIL image, or uint16 [H,W,C] with C = 2 gray + alpha, 3 RGB, 4 RGB + alpha for 16-bit files. size: (width,
    height) in pixels. mode: Pillow's mode, followed by ";16" for such arrays. format: Pillow's name of the file format.
    """

    image: Image.Image | np.ndarray
    metadata: Metadata
    size: tuple[int, int]
    mode: str
    format: str


def unknown_content(path: Path, head: bytes) -> InputError:
    """The error for a file that no decoder recognizes, naming its likely type. head: the first bytes of the file."""
    if not head:
        return InputError(f"{path}: the file is empty")
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        return InputError(f"{path}: a HEIC image; convert it to JPEG or PNG first")
    for start, what in _HINTS:
        if start in head[:64]:
            return InputError(f"{path}: {what}")
    if _is_text(head):
        return InputError(f"{path}: text, not an image (begins with {head[:24].decode(errors='replace')!r})")
    return InputError(
        f"{path}: not an image, or in a format that Pillow cannot read (begins with {head[:12].hex(' ')})"
    )


def _is_text(head: bytes) -> bool:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # a character may be cut off at the end
            return False
        text = head[: error.start].decode("utf-8")
    return all(letter.isprintable() or letter in "\t\r\n\f\ufeff" for letter in text)


def _open(path: Path, frame: int | None, max_pixels: int | None, upscale: int) -> Image.Image:
    """Open by content, check the header, seek to the frame. Only seeking in GIF and WebP decodes pixels."""
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
        raise InputError(f"{path}: {error}; raise PIL.Image.MAX_IMAGE_PIXELS if the image is genuine") from error
    except DECODE_ERRORS as error:
        raise InputError(f"{path}: corrupt: {error or type(error).__name__}") from error
    try:
        check_size(image.width, image.height, upscale, max_pixels=max_pixels, name=str(path))
        return pick_frame(image, frame, str(path))
    except TinySRError:
        image.close()
        raise
    except DECODE_ERRORS as error:
        image.close()
        raise InputError(f"{path}: corrupt {image.format} file: {error or type(error).__name__}") from error


def read_image(
    path: str | os.PathLike[str], *, frame: int | None = None, max_pixels: int | None = None, upscale: int = 4
) -> LoadedImage:
    """Read one image file. The format is detected from the content; the suffix is ignored.

    frame: index from 0, required for a file with several frames. max_pixels: limit on width * height; None derives the
    limit from the free memory, for a result `upscale` times larger per side.
    Raises InputError naming the file and the reason, OutOfMemory if the result would not fit into host memory.
    """
    path = Path(path)
    with _open(path, frame, max_pixels, upscale) as image:
        is_16bit = can_load_16bit(image) and (image.format == "TIFF" or getattr(image, "n_frames", 1) == 1)
        if not is_16bit and drops_bits(image):
            notice(f"{image.format} with more than 8 bits per channel was read as 8 bits")
        form = image.format or "unknown"
        try:
            if is_16bit:
                return _image_16bit(image, load_16bit(image, lambda: _open(path, frame, max_pixels, upscale)))
            image.load()
            key = image.info.get("transparency")
            if image.mode in ("I;16", "I;16B") and isinstance(key, int):
                # Pillow has no mode for 16-bit gray + alpha; an array keeps all bits.
                gray = np.asarray(image).astype(np.uint16)
                alpha = np.where(gray == key, 0, 65535).astype(np.uint16)
                return _image_16bit(image, np.stack([gray, alpha], -1))
            metadata = meta.collect(image)
            oriented = ImageOps.exif_transpose(image) if meta.orientation(image) != 1 else image.copy()
        except TinySRError:
            raise
        except DECODE_ERRORS as error:
            raise InputError(f"{path}: corrupt or truncated {form} file: {error or type(error).__name__}") from error
        return LoadedImage(oriented, metadata, oriented.size, oriented.mode, form)


def _image_16bit(image: Image.Image, pixels: np.ndarray) -> LoadedImage:
    """Combine uint16 pixels [H,W,C] with the metadata of their file and apply the orientation."""
    oriented = _oriented(pixels, meta.orientation(image))
    mode = {2: "LA", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
    size = (oriented.shape[1], oriented.shape[0])
    return LoadedImage(oriented, meta.collect(image), size, f"{mode};16", image.format or "unknown")


def _oriented(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[H,W,C] as stored -> upright (EXIF 2.32, tag 0x0112)."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def upscale_image_file(
    loaded: LoadedImage, enlarge: Enlarge, upscale: int, *, device: torch.device | str | None = None
) -> tuple[Image.Image | np.ndarray, Metadata]:
    """Upscale a loaded file -> the new image (PIL, or uint16 [s*H,s*W,C] for 16-bit files) and its metadata.

    enlarge: the network, see runtime/images/arrays.py. upscale: its factor s. device: where the network runs.
    Raises InputError for a mode that is not accepted, and whatever `enlarge` raises.
    """
    image = loaded.image
    metadata = loaded.metadata.resized(loaded.size[0] * upscale, loaded.size[1] * upscale)
    if isinstance(image, np.ndarray):
        space, tables = color_space(metadata.icc)
        if tables:
            notice("a table-based ICC profile cannot be applied to 16-bit images; the pixels were treated as sRGB")
        return enlarge_pixels(image[None], enlarge, upscale, device=device, space=space)[0], metadata
    result, metadata = upscale_loaded(image, metadata, enlarge, upscale, device=device)
    return result, metadata


def write_image(
    path: str | os.PathLike[str],
    image: Image.Image | np.ndarray,
    metadata: Metadata | None = None,
    encoding: Encoding | None = None,
) -> None:
    """Encode an image in the format of the suffix and write the file atomically.

    image: a PIL image, or uint8 or uint16 [H,W,1..4]. An existing file is replaced only by a complete new one. Raises
    InputError for a suffix that cannot be written or an image outside the format's limits, OSError if writing fails.
    """
    path = Path(path)
    data = encode(image, path.suffix, metadata or Metadata(), encoding or Encoding())
    write_bytes(path, data)


def temporary_path(path: Path) -> Path:
    """An unused hidden name in the same folder, so that renaming it to `path` is atomic."""
    return path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.part")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a file atomically: it is complete or absent, also after an interruption. Raises OSError."""
    path = Path(os.path.realpath(path))  # keep a symbolic link; replace its target
    temporary = temporary_path(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
