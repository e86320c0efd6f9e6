"""16-bit RGB(A) and gray + alpha PNG files, for which Pillow has no modes, read through Pillow's decoder.

Pillow opens them in 8-bit modes: its unpackers keep only the high byte of each sample. The raw mode ("RGB;16B" big
endian, "RGB;16L" little endian) selects that byte, so decoding the file a second time with the opposite byte order
yields exactly the low bytes. This works with every filter and interlacing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

_OPPOSITE = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L"}
_GRAY_ALPHA = "LA;16B"


def _raw_mode(image: Image.Image) -> str:
    """The raw mode of an opened PNG file before it is loaded."""
    tiles = getattr(image, "tile", [])
    return str(tiles[0][3]) if tiles else ""


def can_load_16bit(image: Image.Image) -> bool:
    """Whether load_16bit can read an opened file."""
    return image.format == "PNG" and _raw_mode(image) in (*_OPPOSITE, _GRAY_ALPHA)


def _load_as(image: Image.Image, raw_mode: str) -> np.ndarray:
    """Load an opened file with another raw mode -> uint16 [H,W,C]. A tile is (codec, box, offset, raw mode)."""
    image.tile = [tile._replace(args=raw_mode) for tile in image.tile]  # type: ignore[attr-defined]
    image.load()
    return np.asarray(image).astype(np.uint16)


def load_16bit(image: Image.Image, reopen: Callable[[], Image.Image]) -> np.ndarray:
    """An opened file for which `can_load_16bit` holds -> uint16 [H,W,2|3|4].

    image: is loaded in place and keeps its metadata. reopen: opens the file a second time. The transparent color of a
    PNG (tRNS) becomes alpha. Raises what Pillow's decoders raise on damaged data.
    """
    raw_mode = _raw_mode(image)
    if raw_mode == _GRAY_ALPHA:
        # Four bytes per pixel: gray high, gray low, alpha high, alpha low.
        raw = _load_as(image, "RGBA")
        return raw[..., 0::2] * 256 + raw[..., 1::2]
    high = _load_as(image, raw_mode)
    with reopen() as second:
        pixels = high * 256 + _load_as(second, _OPPOSITE[raw_mode])
    key = image.info.get("transparency")
    if isinstance(key, tuple) and pixels.shape[-1] == 3:
        alpha = np.where((pixels == np.array(key)).all(-1), 0, 65535).astype(np.uint16)
        pixels = np.concatenate([pixels, alpha[..., None]], -1)
    return pixels
