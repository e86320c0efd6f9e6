"""16-bit RGB(A) and gray + alpha, for which Pillow has no modes: read through Pillow's decoders, written as PNG.

Pillow opens 16-bit RGB(A) files in 8-bit modes: its unpackers keep only the high byte of each sample. The raw mode
("RGB;16B" big endian, "RGB;16L" little endian) selects that byte, so decoding the file a second time with the opposite
byte order yields exactly the low bytes. This works with every filter, interlacing and compression that Pillow and
libtiff support.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from tinysr_kernels.runtime.images.metadata import Metadata

_PNG_STRIP_BYTES = 1 << 20  # bounds the temporary buffers of filtering; does not affect speed
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


def to_8bit(pixels: np.ndarray) -> np.ndarray:
    """uint16 -> uint8 of the same shape, rounded to nearest (65535 / 255 = 257)."""
    return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _filtered(rows: np.ndarray, above: np.ndarray, step: int) -> bytes:
    """PNG filtering (ISO 15948, 9.2) of rows, given the rows above them, both uint8 [R,B]; step: bytes per pixel.

    Each row uses the filter with the smallest sum of absolute differences, the heuristic of section 12.8.
    """
    left, corner = np.zeros_like(rows), np.zeros_like(rows)
    left[:, step:], corner[:, step:] = rows[:, :-step], above[:, :-step]
    a, b, c = left.astype(np.int16), above.astype(np.int16), corner.astype(np.int16)
    distance_a, distance_b, distance_c = np.abs(b - c), np.abs(a - c), np.abs(a + b - 2 * c)
    nearest_a = (distance_a <= distance_b) & (distance_a <= distance_c)
    paeth = np.where(nearest_a, left, np.where(distance_b <= distance_c, above, corner))
    average = ((a + b) // 2).astype(np.uint8)
    choices = np.stack([rows, rows - left, rows - above, rows - average, rows - paeth])
    cost = np.abs(choices.view(np.int8).astype(np.int16)).sum(-1, dtype=np.int64)
    best = cost.argmin(0)
    chosen = np.take_along_axis(choices, best[None, :, None], 0)[0]
    return np.concatenate([best.astype(np.uint8)[:, None], chosen], 1).tobytes()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png_metadata(metadata: Metadata) -> Iterator[bytes]:
    if metadata.icc:
        yield _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(metadata.icc))
    if metadata.dpi:
        x, y = (round(dots / 0.0254) for dots in metadata.dpi)
        yield _chunk(b"pHYs", struct.pack(">IIB", x, y, 1))
    if metadata.exif:
        yield _chunk(b"eXIf", metadata.exif.removeprefix(b"Exif\0\0"))
    if metadata.xmp:
        yield _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + metadata.xmp)


def encode_png(pixels: np.ndarray, metadata: Metadata) -> bytes:
    """uint16 [H,W,C], C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha -> the bytes of a 16-bit PNG file."""
    height, width, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", _chunk(b"IHDR", header), *_png_metadata(metadata)]
    packer = zlib.compressobj(6)
    line = width * channels * 2
    count = max(1, _PNG_STRIP_BYTES // line)
    previous = np.zeros((1, line), np.uint8)
    for start in range(0, height, count):
        strip = np.ascontiguousarray(pixels[start : start + count]).astype(">u2")
        rows = strip.reshape(len(strip), -1).view(np.uint8)
        above = np.concatenate([previous, rows[:-1]])
        previous = rows[-1:]
        packed = packer.compress(_filtered(rows, above, channels * 2))
        if packed:
            parts.append(_chunk(b"IDAT", packed))
    parts += [_chunk(b"IDAT", packer.flush()), _chunk(b"IEND", b"")]
    return b"".join(parts)
