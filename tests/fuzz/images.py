"""Damaged image files of every accepted format: read, and sometimes enlarged and written.

A case is a small valid file, then one or more kinds of damage: cut off, bytes flipped, a stretch overwritten, two files
spliced, a length or size field set to an extreme value, a part repeated many times. A few are bombs made on purpose.
"""

from __future__ import annotations

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from tests.runtime.sample_images import SCALE, bytes_of, exif, nearest, noise, sample_image
from tinysr_kernels.errors import InputError, OutOfMemory
from tinysr_kernels.files.picture_io import read_image, upscale_image_file, write_image
from tinysr_kernels.files.writing.png import encode_png
from tinysr_kernels.files.writing.tiff import encode_tiff
from tinysr_kernels.runtime.images.metadata import Metadata

SECONDS = 10.0
MEMORY = 1 << 30
MAX_PIXELS = 1 << 22

_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def setup() -> None:
    """Silence Pillow's warnings, and give it the limit that the command gives it."""
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def _pillow(form: str, mode: str = "RGB", **options: object) -> Callable[[], bytes]:
    return lambda: bytes_of(sample_image(mode, 23, 17), form, **options)


def _frames(form: str) -> bytes:
    first, *others = (sample_image("RGB", 23, 17, seed) for seed in range(4))
    return bytes_of(first, form, save_all=True, append_images=others)


def _tiff(shape: tuple[int, ...], dtype: str, **options: object) -> Callable[[], bytes]:
    def make() -> bytes:
        import tifffile

        stream = io.BytesIO()
        pixels = noise(shape[0], shape[1], shape[2] if len(shape) > 2 else 1, dtype)
        if options.get("planarconfig") == "separate":
            pixels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
        tifffile.imwrite(stream, pixels if len(shape) > 2 else pixels[..., 0], **options)
        return stream.getvalue()

    return make


def _pages() -> bytes:
    import tifffile

    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for seed in range(3):
            writer.write(noise(9, 8, 3, "uint16", seed), photometric="rgb", subifds=1, contiguous=False)
            writer.write(noise(5, 4, 3, "uint16", seed), photometric="rgb", subfiletype=1)
    return stream.getvalue()


def _heif() -> bytes:
    import pillow_heif

    stream = io.BytesIO()
    pillow_heif.from_pillow(sample_image("RGB", 64, 48)).save(stream, quality=60)
    return stream.getvalue()


_METADATA = Metadata(exif=exif().tobytes(), xmp=b"<x:xmpmeta tiff:ImageWidth='9'/>", dpi=(300, 300))
_MAKERS: dict[str, Callable[[], bytes]] = {
    "png": _pillow("PNG", exif=exif()),
    "png-palette": _pillow("PNG", "P+"),
    "png-gray16": _pillow("PNG", "I;16"),
    "png16": lambda: encode_png(noise(17, 23, 4, "uint16"), _METADATA),
    "apng": lambda: _frames("PNG"),
    "jpeg": _pillow("JPEG", exif=exif()),
    "jpeg-progressive": _pillow("JPEG", progressive=True),
    "jpeg-cmyk": _pillow("JPEG", "CMYK"),
    "mpo": lambda: _frames("MPO"),
    "webp": _pillow("WEBP", exif=exif()),
    "webp-frames": lambda: _frames("WEBP"),
    "gif": _pillow("GIF", "P"),
    "gif-frames": lambda: _frames("GIF"),
    "bmp": _pillow("BMP"),
    "bmp-palette": _pillow("BMP", "P"),
    "ppm": _pillow("PPM"),
    "ppm16": lambda: b"P6 23 17 65535\n" + noise(17, 23, 3, "uint16").tobytes(),
    "ppm-text": lambda: b"P3 3 2 255\n" + b" 10 200 3" * 6,
    "tga": _pillow("TGA", "RGBA", compression="tga_rle"),
    "ico": _pillow("ICO", "RGBA", sizes=[(16, 16), (23, 17)]),
    "ico-bitmap": _pillow("ICO", "RGBA", sizes=[(16, 16)], bitmap_format="bmp"),
    "avif": _pillow("AVIF"),
    "jpeg2000": _pillow("JPEG2000"),
    "jpeg2000-raw": _pillow("JPEG2000", no_jp2=True),
    "pcx": _pillow("PCX"),
    "sgi": _pillow("SGI"),
    "qoi": _pillow("QOI"),
    "heif": _heif,
    "tiff": lambda: encode_tiff(noise(17, 23, 3, "uint8"), _METADATA),
    "tiff16": lambda: encode_tiff(noise(17, 23, 4, "uint16"), _METADATA),
    "tiff-tiles": _tiff((40, 50, 3), "uint16", photometric="rgb", tile=(16, 32), compression="zlib", predictor=True),
    "tiff-planes": _tiff((17, 23, 3), "uint16", photometric="rgb", planarconfig="separate", byteorder=">"),
    "tiff-lzw": _tiff((17, 23, 3), "uint16", photometric="rgb", compression="lzw", rowsperstrip=4),
    "tiff-big": _tiff((17, 23), "uint16", photometric="miniswhite", bigtiff=True),
    "tiff-pages": _pages,
    "tiff-jpeg": _pillow("TIFF", compression="jpeg"),
    "tiff-bilevel": _pillow("TIFF", "1", compression="group4"),
    "tiff-palette": _pillow("TIFF", "P", compression="tiff_lzw"),
    "tiff-cmyk": _pillow("TIFF", "CMYK"),
}
NAMES = tuple(_MAKERS)


@cache
def whole(name: str) -> bytes:
    """A valid file of a kind."""
    return _MAKERS[name]()


def _cut(data: bytearray, draw: random.Random) -> bytearray:
    return data[: draw.randrange(len(data) + 1)]


def _flip(data: bytearray, draw: random.Random) -> bytearray:
    # Most damage that a decoder looks at is near the beginning.
    for _ in range(draw.choice((1, 1, 2, 5, 30))):
        end = len(data) if draw.random() < 0.5 else min(len(data), 200)
        data[draw.randrange(end)] = draw.randrange(256)
    return data


def _overwrite(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    size = draw.choice((4, 16, 100))
    data[start : start + size] = draw.choice((bytes(size), b"\xff" * size, draw.randbytes(size)))
    return data


def _extreme(data: bytearray, draw: random.Random) -> bytearray:
    """Set a field, of any width and byte order, to a size or length that no file of this kind has."""
    for _ in range(draw.choice((1, 1, 2))):
        width = draw.choice((1, 2, 4, 4))
        value = draw.choice(_EXTREMES) & (1 << 8 * width) - 1
        start = draw.randrange(min(len(data), draw.choice((64, 300, 1 << 30))))
        data[start : start + width] = value.to_bytes(width, draw.choice(("big", "little")))
    return data


def _splice(data: bytearray, draw: random.Random) -> bytearray:
    other = whole(draw.choice(NAMES))
    return data[: draw.randrange(len(data) + 1)] + other[draw.randrange(len(other)) :]


def _repeat(data: bytearray, draw: random.Random) -> bytearray:
    start = draw.randrange(len(data))
    size = draw.choice((12, 26, 100, 1000))
    return data[:start] + data[start : start + size] * draw.choice((10, 1000, 5000)) + data[start + size :]


def _fixed_checksums(data: bytearray, draw: random.Random) -> bytearray:
    """Damage a PNG's chunks but mend their checksums, so that what is in them is looked at."""
    data = _extreme(data, draw) if draw.random() < 0.5 else _flip(data, draw)
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[position + 4 : end]))
        position = end + 4
    return data


_DAMAGE = (_cut, _flip, _flip, _overwrite, _extreme, _extreme, _splice, _repeat)


def _bomb(draw: random.Random) -> bytes:
    """Small files that ask for much memory or time."""
    side = draw.choice((5000, 20000, 65000))
    kind = draw.randrange(7)
    if kind == 0:  # an icon whose own image is larger than its directory says
        inner = bytes_of(Image.new("L", (3000, 3000)), "PNG")
        return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner
    if kind == 1:  # many scans
        data = bytes_of(Image.new("RGB", (1500, 1500)), "JPEG", progressive=True)
        scan = data.rfind(b"\xff\xda")
        return data[:scan] + data[scan:-2] * 13000 + data[-2:]
    if kind == 2:  # many directories
        count = draw.choice((300, 60000))
        one = struct.pack("<H", 2) + struct.pack("<HHIIHHII", 256, 4, 1, 9, 257, 4, 1, 9)
        size = len(one) + 4
        return b"II*\0\x08\0\0\0" + b"".join(one + struct.pack("<I", 8 + size * (i + 1)) for i in range(count))
    if kind == 3:  # a canvas and frames beyond it
        frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\2\2\x44\1\0"
        return b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0x80, 0, 0) + bytes(6) + frame * 3 + b";"
    if kind == 4:  # a chunk that grows when it is decompressed
        chunk = draw.choice((b"zTXtname\0\0", b"iCCPname\0\0")) + zlib.compress(bytes(100 << 20))
        whole_png = whole("png")
        packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return whole_png[:33] + packed + whole_png[33:]
    if kind == 5:  # a strip that grows beyond the image
        strip = zlib.compress(bytes(200 << 20))
        fields = {256: 9, 257: 9, 258: 8, 259: 8, 262: 1, 273: 110, 277: 1, 279: len(strip)}
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
        return b"II*\0\x08\0\0\0" + struct.pack("<H", len(fields)) + entries + bytes(4) + strip
    header = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
    chunk = b"IHDR" + header
    packed = struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + packed + whole("png")[33:]


def case(seed: int, folder: Path) -> str:
    """Read one damaged file; every fourth time also enlarge and write it."""
    draw = random.Random(seed)
    name = draw.choice(NAMES)
    data = bytearray(whole(name))
    if draw.random() < 0.03:
        data = bytearray(_bomb(draw))
    else:
        if name.startswith(("png", "apng")) and draw.random() < 0.4:
            data = _fixed_checksums(data, draw)
        for _ in range(draw.choice((0, 1, 1, 1, 2))):
            data = draw.choice(_DAMAGE)(data, draw) or data
    path = folder / "input"
    path.write_bytes(data)
    frame = draw.choice((None, None, 0, 1, 10**6))
    try:
        loaded = read_image(path, frame=frame, max_pixels=MAX_PIXELS, allow_truncated=draw.random() < 0.5)
        if draw.random() < 0.25 and loaded.size[0] * loaded.size[1] < 1 << 14:
            image, metadata = upscale_image_file(loaded, nearest, SCALE)
            write_image(folder / ("out" + draw.choice((".png", ".tif"))), image, metadata)
    except (InputError, OutOfMemory) as error:
        if len(str(error)) > 1000 or not str(error).startswith((str(path), "mode ")):
            raise RuntimeError("a message that is too long or names no file") from error
        return type(error).__name__
    return "accepted"
