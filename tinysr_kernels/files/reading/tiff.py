"""Read TIFF and BigTIFF files by their tags.

Gray and RGB of 8 or 16 bits, with or without alpha, in any layout (strips, tiles, planes, byte orders, predictor) and
every lossless compression, are read through tifffile. Bilevel, palette, CMYK, Lab and YCbCr images, and JPEG
compression, are read through Pillow, in the combinations of tags that were tried. Everything else is refused by name: a
reader that trusts the wrong tag returns a picture, but not that of the file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImagePalette

from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.files.reading.decoded import Decoded, TagCarrier, damaged, straight_color
from tinysr_kernels.files.reading.sniff import raw_file
from tinysr_kernels.files.reading.tiff_segments import LOSSLESS, read_segments
from tinysr_kernels.runtime.images.bounds import DECODE_ERRORS
from tinysr_kernels.runtime.images.structure import Directory, DirectoryError, sub_directories, tiff_directories
from tinysr_kernels.runtime.notices import notice

if TYPE_CHECKING:
    from tifffile import TiffPage

_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SUBIFDS, _DNG = 254, 256, 257, 258, 259, 262, 330, 50706
_TAGS = (_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SUBIFDS, _DNG)
_NOT_AN_IMAGE_OF_ITS_OWN = 1 | 4  # NewSubfileType: a reduced copy, a transparency mask
_RAW_PHOTOMETRICS = (32803, 34892)  # color filter array, linear raw
_RAW_COMPRESSIONS = (262, 32767, 32769, 32770, 32867, 34713, 65535)  # Kodak, Sony, Epson, Samsung, Nikon, Pentax

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_COLORS = {
    _WHITE_IS_ZERO: "gray",
    _BLACK_IS_ZERO: "gray",
    _RGB: "RGB",
    _PALETTE: "palette",
    _CMYK: "CMYK",
    _YCBCR: "YCbCr",
    _LAB: "Lab",
}
_JPEG = (6, 7)
_FAX = (2, 3, 4)
_SAMPLES = {
    1: "integers",
    2: "signed integers",
    3: "floating-point numbers",
    5: "complex numbers",
    6: "complex numbers",
}

# What Pillow reads rightly: photometric, bits per sample, samples, planes, and the compressions.
_PILLOW = {
    **{(color, bits, 1, 1): LOSSLESS for color in (0, 1) for bits in (2, 4)},
    **{(color, 1, 1, 1): (*LOSSLESS, *_FAX) for color in (0, 1)},
    **{(_PALETTE, bits, 1, 1): LOSSLESS for bits in (1, 2, 4, 8)},
    **{(color, 8, 1, 1): _JPEG for color in (0, 1)},
    **{(color, 8, 3, 1): _JPEG for color in (_RGB, _YCBCR)},
    (_CMYK, 8, 4, 1): (*LOSSLESS, *_JPEG),
    (_CMYK, 16, 4, 1): LOSSLESS,
    (_LAB, 8, 3, 1): LOSSLESS,
}

Check = Callable[[int, int], None]
"""Raises for an image that is too large; width and height in pixels."""


def read_tiff(path: Path, stream: BinaryIO, frame: int | None, check: Check, allow_truncated: bool) -> Decoded:
    """One image of a TIFF file. path: for messages. frame: its index, needed if the file has several.

    check: is called with the size of each part before it is decoded. allow_truncated: see `read_segments`.
    Raises InputError for a file that is not accepted or damaged.
    """
    try:
        directories = tiff_directories(stream, _TAGS)
    except DirectoryError as error:
        raise InputError(f"{path}: a TIFF file, but {error}") from error
    if not directories or _WIDTH not in directories[0].tags:
        raise InputError(f"{path}: corrupt TIFF file: it has no image")
    if _is_raw(directories + sub_directories(stream, directories, _TAGS)):
        raise raw_file(path)
    index = _choose(path, directories, frame)
    directory = directories[index]
    check(directory.get(_WIDTH), directory.get(_HEIGHT))
    carrier = TagCarrier(stream, directory.offset)
    plain = False
    try:
        with _quiet_tifffile():
            page = _page(stream, directory.offset)
            check(page.imagewidth, page.imagelength)
            plain = _is_plain(page)
            if page.is_tiled:
                check(page.tilewidth, page.tilelength)
            if plain:
                pixels = _finished(page, read_segments(page, allow_truncated))
                return Decoded(_as_image(pixels), carrier)
        _check_combination(path, page)
        return Decoded(_through_pillow(stream, index), carrier, upright=True)
    except TinySRError:
        raise
    except DECODE_ERRORS as error:
        raise damaged(path, "TIFF", error, partial=plain and not allow_truncated) from error


_reading: ContextVar[bool] = ContextVar("reading", default=False)


def _is_heard(record: logging.LogRecord) -> bool:
    return not _reading.get()


@contextmanager
def _quiet_tifffile() -> Iterator[None]:
    """Drop what tifffile logs in this thread: it logs what it repairs, and raises the rest."""
    logging.getLogger("tifffile").addFilter(_is_heard)  # added once, however often
    token = _reading.set(True)
    try:
        yield
    finally:
        _reading.reset(token)


def _is_raw(directories: list[Directory]) -> bool:
    return any(
        _DNG in each.tags or each.get(_PHOTOMETRIC) in _RAW_PHOTOMETRICS or each.get(_COMPRESSION) in _RAW_COMPRESSIONS
        for each in directories
    )


def _choose(path: Path, directories: list[Directory], frame: int | None) -> int:
    """The index of the directory to read: images of their own count, reduced copies and masks do not."""
    whole = [i for i, each in enumerate(directories) if not each.get(_SUBFILE) & _NOT_AN_IMAGE_OF_ITS_OWN]
    whole = whole or [0]
    if frame is not None and not 0 <= frame < len(whole):
        raise InputError(f"{path}: frame {frame} is out of range; the frames are 0 to {len(whole) - 1}")
    if frame is None and len(whole) > 1:
        raise InputError(f"{path}: {len(whole)} frames (TIFF); select one with frame=N (--frame N), counted from 0")
    if len(whole) < len(directories):
        notice(f"{len(directories) - len(whole)} secondary images in the file (reduced copies, masks) were dropped")
    return whole[frame or 0]


def _page(stream: BinaryIO, offset: int) -> TiffPage:
    from tifffile import TiffFile, TiffPage

    stream.seek(0)
    file = TiffFile(stream)
    file.filehandle.seek(offset)
    return TiffPage(file, index=0)


def _is_plain(page: TiffPage) -> bool:
    """Whether a page is read through tifffile."""
    colors = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3}.get(int(page.photometric))
    return (
        colors is not None
        and page.bitspersample in (8, 16)
        and page.sampleformat == 1
        and page.samplesperpixel >= colors
        and page.predictor in (1, 2)
        and page.compression in LOSSLESS
    )


def _finished(page: TiffPage, stored: np.ndarray) -> np.ndarray:
    """[planes, H, W, samples] as stored -> [H, W, C] with C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha."""
    pixels = stored[0] if page.planarconfig == 1 else np.moveaxis(stored[..., 0], 0, -1)
    colors = 3 if page.photometric == _RGB else 1
    top = np.iinfo(pixels.dtype).max
    color = top - pixels[..., :colors] if page.photometric == _WHITE_IS_ZERO else pixels[..., :colors]
    extra = [int(kind) for kind in page.extrasamples]
    if pixels.shape[-1] == colors + 1 and (not extra or extra[0] not in (0, 1, 2)):
        extra = [2]  # the tag is missing, or Corel's 999: what every reader takes for alpha
    alphas = [position for position, kind in enumerate(extra) if kind in (1, 2)]
    dropped = pixels.shape[-1] - colors - bool(alphas)
    if dropped:
        notice(f"{dropped} channels that are neither color nor transparency were dropped")
    if not alphas:
        return np.ascontiguousarray(color)
    alpha = pixels[..., colors + alphas[0], None]
    if extra[alphas[0]] == 1:
        color = straight_color(color, alpha)
    return np.concatenate([color, alpha], -1)


def _as_image(pixels: np.ndarray) -> Image.Image | np.ndarray:
    if pixels.shape[-1] == 1:
        return Image.fromarray(pixels[..., 0])
    return Image.fromarray(pixels) if pixels.dtype == np.uint8 else pixels


def _check_combination(path: Path, page: TiffPage) -> None:
    """Raise InputError unless Pillow reads the page rightly."""
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    key = (int(page.photometric), page.bitspersample, page.samplesperpixel, planes)
    if page.sampleformat == 1 and page.compression in _PILLOW.get(key, ()) and page.predictor in (1, 2):
        if key[:2] == (_CMYK, 16):
            notice("TIFF with more than 8 bits per channel was read as 8 bits")
        return
    raise InputError(
        f"{path}: {describe(page)}; this combination is not accepted: convert it to gray or RGB of 8 or 16 bits "
        "without floating-point numbers, uncompressed or with LZW or Deflate"
    )


def describe(page: TiffPage) -> str:
    """What a page holds, in words."""
    bits = page.bitspersample
    depth = f"{bits}-bit" if isinstance(bits, int) else f"{'/'.join(map(str, bits[:6]))}-bit"
    color = _COLORS.get(int(page.photometric), f"photometric interpretation {int(page.photometric)}")
    samples = _SAMPLES.get(page.sampleformat, f"sample format {page.sampleformat}")
    count = f"{page.samplesperpixel} channel" + ("s" if page.samplesperpixel != 1 else "")
    layout = " in planes" if page.planarconfig == 2 and page.samplesperpixel > 1 else ""
    compression = getattr(page.compression, "name", None)
    compression = f"{compression} compression" if compression else f"compression {int(page.compression)}"
    predictor = f", predictor {int(page.predictor)}" if int(page.predictor) > 2 else ""
    return f"a TIFF image of {depth} {samples}, {color}, {count}{layout}, {compression}{predictor}"


def _through_pillow(stream: BinaryIO, index: int) -> Image.Image:
    """The image at an index of the chain, loaded and upright."""
    stream.seek(0)
    image = Image.open(stream, formats=["TIFF"])
    if index:
        image.seek(index)
    if image.mode == "P":
        _mend_palette(image)
    image.load()
    return image.copy()


def _mend_palette(image: Image.Image) -> None:
    """Some writers store 8-bit colors in the 16-bit palette; Pillow would read them as black."""
    colors = image.tag_v2.get(320, ())  # type: ignore[attr-defined]
    if colors and max(colors) < 256:
        image.palette = ImagePalette.raw("RGB;L", bytes(colors))
