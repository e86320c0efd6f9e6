"""16-bit RGB(A) and gray + alpha, for which Pillow has no modes, read through Pillow's decoders.

Pillow opens 16-bit RGB(A) files in 8-bit modes: its unpackers keep only the high byte of each sample. The raw mode
("RGB;16B" big endian, "RGB;16L" little endian) selects that byte, so decoding the file a second time with the opposite
byte order yields exactly the low bytes. This works with every filter, interlacing and compression that Pillow and
libtiff support.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from PIL import Image

_OPPOSITE_ORDER = {"B": "L", "L": "B", "N": "L" if sys.byteorder == "big" else "B"}


def _raw_modes(image: Image.Image) -> list[str]:
    """The raw modes of an opened file's tiles, before it is loaded; empty for any other image."""
    modes = []
    for tile in getattr(image, "tile", []):
        arguments = tile[3]
        if isinstance(arguments, tuple) and arguments:
            arguments = arguments[0]
        if isinstance(arguments, str):
            modes.append(arguments)
    return modes


def drops_bits(image: Image.Image) -> bool:
    """Whether Pillow would truncate the samples of an opened file to 8 bits."""
    if image.format == "JPEG2000" and image.mode in ("LA", "RGB", "RGBA"):
        return _jpeg2000_depth(image) > 8
    if image.format == "PPM" and image.mode in ("RGB", "CMYK"):
        tiles = getattr(image, "tile", [])
        return any(isinstance(tile[3], tuple) and tile[3][-1] > 255 for tile in tiles if tile[0] != "raw")
    return image.mode not in ("I", "I;16", "I;16B") and any(";16" in mode for mode in _raw_modes(image))


def _jpeg2000_depth(image: Image.Image) -> int:
    """Bits per sample from the codestream's SIZ marker (ISO 15444-1, A.5.1); 8 if the marker is not found."""
    stream = getattr(image, "fp", None)
    if stream is None:
        return 8
    position = stream.tell()
    stream.seek(0)
    head = stream.read(4096)
    stream.seek(position)
    marker = head.find(b"\xff\x4f\xff\x51")
    if marker < 0 or marker + 42 >= len(head):
        return 8
    return (head[marker + 42] & 0x7F) + 1


def can_load_16bit(image: Image.Image) -> bool:
    """Whether load_16bit can read an opened file: PNG or TIFF with interleaved samples, RGB(A) or gray + alpha."""
    modes = _raw_modes(image)
    if image.format not in ("PNG", "TIFF") or image.mode not in ("RGB", "RGBA") or not modes:
        return False
    if getattr(image, "tag_v2", {}).get(284, 1) != 1:  # PlanarConfiguration: separate planes per channel
        return False
    return all(mode.split(";")[0] in ("RGB", "RGBA", "RGBX", "RGBa", "LA") for mode in modes) and all(
        ";16" in mode for mode in modes
    )


def _load_as(image: Image.Image, change: Callable[[str], str]) -> np.ndarray:
    """Load an opened file with changed raw modes -> uint16 array. A tile is (codec, box, offset, arguments)."""
    tiles = []
    for tile in image.tile:  # type: ignore[attr-defined]
        arguments = tile[3]
        if isinstance(arguments, tuple):
            arguments = (change(arguments[0]), *arguments[1:])
        else:
            arguments = change(arguments)
        tiles.append(tile._replace(args=arguments))
    image.tile = tiles  # type: ignore[attr-defined]
    image.load()
    return np.asarray(image).astype(np.uint16)


def load_16bit(image: Image.Image, reopen: Callable[[], Image.Image]) -> np.ndarray:
    """An opened file for which `can_load_16bit` holds -> uint16 [H,W,2|3|4], alpha not premultiplied.

    image: is loaded in place and keeps its metadata. reopen: opens the same frame a second time. The transparent color
    of a PNG (tRNS) becomes alpha. Raises what Pillow's decoders raise on damaged data.
    """
    mode = _raw_modes(image)[0]
    if mode.startswith("LA"):
        # Four bytes per pixel: gray high, gray low, alpha high, alpha low.
        raw = _load_as(image, lambda _: "RGBA")
        return raw[..., 0::2] * 256 + raw[..., 1::2]
    high = _load_as(image, lambda raw_mode: raw_mode.replace("RGBa", "RGBA"))
    with reopen() as second:
        low = _load_as(second, lambda raw_mode: raw_mode[:-1].replace("RGBa", "RGBA") + _OPPOSITE_ORDER[raw_mode[-1]])
    pixels = high * 256 + low
    if mode.startswith("RGBa"):
        alpha = pixels[..., 3:].astype(np.uint32)
        color = (pixels[..., :3].astype(np.uint64) * 65535 + alpha // 2) // np.maximum(alpha, 1)
        pixels[..., :3] = np.minimum(color, 65535)
    key = image.info.get("transparency")
    if isinstance(key, tuple) and pixels.shape[-1] == 3:
        alpha16 = np.where((pixels == np.array(key)).all(-1), 0, 65535).astype(np.uint16)
        pixels = np.concatenate([pixels, alpha16[..., None]], -1)
    return pixels
