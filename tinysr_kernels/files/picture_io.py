"""Read and write image files. The format of an input is detected from its content; outputs are written atomically.

Reading: files/reading/ has a file for each group of formats; sizes are checked before pixels are decoded, and all bits
are kept where the decoder can. Writing chooses the format by suffix and keeps metadata (docs/images.md).
`upscale_image_file` connects both to the network.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from tinysr_kernels.atomic import write_bytes
from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.files.encode import Encoding, encode
from tinysr_kernels.files.reading.decoded import Decoded, damaged
from tinysr_kernels.files.reading.heif import read_heif
from tinysr_kernels.files.reading.pillow import read_pillow
from tinysr_kernels.files.reading.sniff import HEAD_BYTES, is_heif, is_tiff, refused
from tinysr_kernels.files.reading.tiff import read_tiff
from tinysr_kernels.runtime.device.host_memory import check_size
from tinysr_kernels.runtime.device.out_of_memory import typed_out_of_memory
from tinysr_kernels.runtime.images import metadata as meta
from tinysr_kernels.runtime.images.arrays import Enlarge, enlarge_pixels
from tinysr_kernels.runtime.images.bounds import DECODE_ERRORS, check_structure
from tinysr_kernels.runtime.images.metadata import Metadata
from tinysr_kernels.runtime.images.pil import color_space, upscale_loaded
from tinysr_kernels.runtime.images.scaling import NATIVE, Target
from tinysr_kernels.runtime.images.structure import read_at
from tinysr_kernels.runtime.images.tags.header import Header, read_header
from tinysr_kernels.runtime.images.tags.png import without_long_texts
from tinysr_kernels.runtime.notices import notice
from tinysr_kernels.runtime.runner import Report, reporting

_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by its EXIF orientation."""


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


def read_image(
    path: str | os.PathLike[str],
    *,
    frame: int | None = None,
    max_pixels: int | None = None,
    upscale: int = 4,
    allow_truncated: bool = False,
) -> LoadedImage:
    """Read one image file. The format is detected from the content; the suffix is ignored.

    frame: index from 0, required for a file with several frames. max_pixels: limit on width * height; None derives the
    limit from the free memory, for a result `upscale` times larger per side. allow_truncated: decode damaged files as
    far as they go, with a notice, where the format allows it (JPEG, PNG, TIFF, BMP, PPM, TGA).
    Raises InputError naming the file and the reason, OutOfMemory if the result would not fit into host memory.
    """
    path = Path(path)

    def check(width: int, height: int) -> None:
        if width <= 0 or height <= 0:
            raise InputError(f"{path}: damaged: an image of {width}x{height} pixels")
        check_size(width, height, upscale, max_pixels=max_pixels, name=str(path))

    with _opened(path) as stream:
        head = read_at(stream, 0, HEAD_BYTES)
        refusal = refused(path, head)
        if refusal is not None:
            raise refusal
        try:
            check_structure(stream, str(path), upscale, frame=frame, max_pixels=max_pixels)
            stream = without_long_texts(stream)
            if is_tiff(head):
                decoded = read_tiff(path, stream, frame, check, allow_truncated)
            elif is_heif(head):
                decoded = read_heif(path, stream, frame, check)
            else:
                decoded = read_pillow(path, stream, frame, check, allow_truncated)
            return _loaded(decoded, read_header(stream, decoded.carrier.format))
        except TinySRError:
            raise
        except DECODE_ERRORS as error:
            raise damaged(path, "image", error) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise InputError(f"{path}: not a regular file")
        stream = open(path, "rb")  # noqa: SIM115  closed below
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with stream:
        yield stream


def _loaded(decoded: Decoded, header: Header) -> LoadedImage:
    """Apply the orientation, and collect the metadata while the file is open."""
    pixels, carrier = decoded.pixels, decoded.carrier
    form = carrier.format or "unknown"
    orientation = 1 if decoded.upright else meta.orientation(carrier)
    if isinstance(pixels, np.ndarray):
        pixels = _oriented(pixels, orientation)
        mode = {2: "LA", 3: "RGB", 4: "RGBA"}[pixels.shape[-1]]
        metadata = meta.collect(carrier, header, mode=mode)
        return LoadedImage(pixels, metadata, (pixels.shape[1], pixels.shape[0]), f"{mode};16", form)
    metadata = meta.collect(carrier, header, mode=pixels.mode)
    upright = pixels.transpose(_TRANSPOSED[orientation]) if orientation != 1 else pixels.copy()
    return LoadedImage(upright, metadata, upright.size, upright.mode, form)


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
    loaded: LoadedImage,
    enlarge: Enlarge,
    upscale: int,
    *,
    device: torch.device | str | None = None,
    target: Target = NATIVE,
    progress: Report | None = None,
) -> tuple[Image.Image | np.ndarray, Metadata]:
    """Upscale a loaded file -> the new image (PIL, or uint16 [s*H,s*W,C] for 16-bit files) and its metadata.

    enlarge: the network, see runtime/images/arrays.py. upscale: its factor s. device: where the network runs. target:
    another size of the result. progress: called with (done, total) after every tile, if `enlarge` has this parameter.
    Raises InputError for a mode or a target that is refused, OutOfMemory, and whatever `enlarge` raises.
    """
    if progress is not None:
        enlarge = reporting(enlarge, progress)
    size = target.output(*loaded.size, upscale)
    check_size(*loaded.size, upscale, result=size, max_pixels=loaded.size[0] * loaded.size[1])
    with typed_out_of_memory("the image or its result does not fit into host memory"):
        return _upscaled(loaded, enlarge, upscale, device, target, loaded.metadata.resized(*size))


def _upscaled(
    loaded: LoadedImage,
    enlarge: Enlarge,
    upscale: int,
    device: torch.device | str | None,
    target: Target,
    metadata: Metadata,
) -> tuple[Image.Image | np.ndarray, Metadata]:
    image = loaded.image
    if isinstance(image, np.ndarray):
        space, tables = color_space(metadata.icc)
        if tables:
            notice("a table-based ICC profile cannot be applied to 16-bit images; the pixels were treated as sRGB")
        pixels = enlarge_pixels(image[None], enlarge, upscale, device=device, space=space, target=target)
        return pixels[0], metadata
    return upscale_loaded(image, metadata, enlarge, upscale, device=device, target=target)


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
