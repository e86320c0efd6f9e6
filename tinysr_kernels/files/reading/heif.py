"""Read HEIC and HEIF files through pillow-heif, all bits kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.files.reading.decoded import Decoded, damaged, straight_color
from tinysr_kernels.runtime.images.bounds import DECODE_ERRORS


def read_heif(path: Path, stream: BinaryIO, frame: int | None, check: Callable[[int, int], None]) -> Decoded:
    """One image of a HEIF file. path: for messages. frame: its index, needed if the file has several.

    check: is called with the size before pixels are decoded. Raises InputError if pillow-heif is missing or the choice
    of the frame is, and for damaged files.
    """
    try:
        from pillow_heif import HeifImageFile, open_heif
    except ImportError as error:
        raise InputError(
            f"{path}: a HEIC image; pip install 'tinysr-kernels[heif]', or convert it to JPEG or PNG"
        ) from error
    try:
        # As Pillow sees it: orientation and metadata are settled, pixels are not decoded.
        return _read(path, HeifImageFile(stream), open_heif, frame, check)
    except TinySRError:
        raise
    except DECODE_ERRORS as error:
        raise damaged(path, "HEIC", error) from error


def _read(
    path: Path, carrier: Any, open_heif: Callable[..., Any], frame: int | None, check: Callable[[int, int], None]
) -> Decoded:
    count = carrier.n_frames
    if frame is not None and not 0 <= frame < count:
        raise InputError(f"{path}: frame {frame} is out of range; the frames are 0 to {count - 1}")
    if frame is None and count > 1:
        raise InputError(f"{path}: {count} frames (HEIF); select one with frame=N (--frame N), counted from 0")
    check(*carrier.size)
    if frame is not None:
        carrier.seek(frame)
        check(*carrier.size)
    depth = int(carrier.info.get("bit_depth", 8))
    if depth <= 8:
        carrier.load()
        return Decoded(carrier, carrier)
    carrier.fp.seek(0)
    image = open_heif(carrier.fp, convert_hdr_to_8bit=False, hdr_to_16bit=False)[carrier.tell()]
    stored = np.asarray(image).astype(np.uint32).reshape(image.size[1], image.size[0], -1)
    top = (1 << depth) - 1
    pixels = ((stored * 65535 + top // 2) // top).clip(0, 65535).astype(np.uint16)
    carrier.info.pop("bit_depth", None)
    if pixels.shape[-1] == 1:
        return Decoded(Image.fromarray(pixels[..., 0]), carrier)
    if image.mode.startswith("RGBa"):
        pixels = np.concatenate([straight_color(pixels[..., :3], pixels[..., 3:]), pixels[..., 3:]], -1)
    return Decoded(pixels, carrier)
