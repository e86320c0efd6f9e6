"""8-bit and 16-bit TIFF files, gray or RGB, with or without alpha; BigTIFF where 32-bit offsets do not suffice.

Little endian, in strips, Deflate with the horizontal predictor (TIFF 6.0, sections 3 and 14; Adobe's technote on
Deflate). Pillow cannot write 16-bit RGB, and tifffile cannot write the directories of EXIF: the directory is Pillow's.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from tinysr_kernels.runtime.images.metadata import PARSE_ERRORS, Metadata, report_lost
from tinysr_kernels.runtime.images.tags.tiff import tags_of
from tinysr_kernels.runtime.notices import notice

_STRIP_BYTES = 1 << 20
_CLASSIC_LIMIT = (1 << 32) - (1 << 26)  # bytes of strips; offsets are 32-bit, and the metadata need room too
_CLASSIC, _BIG = b"II*\0\x08\0\0\0", b"II+\0\x08\0\0\0\x10\0\0\0\0\0\0\0"
_LONG8 = 16


def _strips(pixels: np.ndarray) -> tuple[list[bytes], int]:
    height, width, channels = pixels.shape
    rows = max(1, min(height, _STRIP_BYTES // (width * channels * pixels.itemsize)))
    strips = []
    for start in range(0, height, rows):
        strip = np.array(pixels[start : start + rows], dtype=pixels.dtype.newbyteorder("<"))
        strip[:, 1:] -= pixels[start : start + rows, :-1]
        strips.append(zlib.compress(strip.tobytes(), 6))
    return strips, rows


def _directory(pixels: np.ndarray, strips: list[bytes], rows: int, metadata: Metadata, exif: bool) -> bytes:
    height, width, channels = pixels.shape
    big = sum(map(len, strips)) > _CLASSIC_LIMIT
    directory = ImageFileDirectory_v2(_BIG if big else _CLASSIC)
    if big:
        directory.tagtype[273] = _LONG8
    if exif and metadata.exif:
        tags, lost = tags_of(metadata.exif)
        report_lost(lost, "because it cannot move to TIFF")
        for tag, value in tags.items():
            directory[tag] = value
    lengths = [len(strip) for strip in strips]
    directory[256], directory[257] = width, height
    directory[258] = (pixels.itemsize * 8,) * channels
    directory[259] = 8  # Deflate
    directory[262] = 1 if channels < 3 else 2  # 1: gray, black is zero; 2: RGB
    directory[273] = tuple(int(start) for start in np.cumsum([0, *lengths[:-1]]))  # shifted past the tags by save()
    directory[277] = channels
    directory[278] = rows
    directory[279] = tuple(lengths)
    directory[284] = 1
    directory[317] = 2  # horizontal differencing
    if channels in (2, 4):
        directory[338] = 2  # alpha, not premultiplied
    if metadata.dpi:
        directory[282], directory[283] = metadata.dpi
        directory[296] = 2
    if metadata.xmp:
        directory.tagtype[700] = 1
        directory[700] = metadata.xmp
    if metadata.iptc:
        directory.tagtype[33723] = 7
        directory[33723] = metadata.iptc
    if metadata.icc:
        directory[34675] = metadata.icc
    stream = io.BytesIO()
    directory.save(stream)
    return stream.getvalue()


def encode_tiff(pixels: np.ndarray, metadata: Metadata) -> bytes:
    """uint8 or uint16 [H,W,C], C = 1 gray, 2 gray + alpha, 3 RGB, 4 RGB + alpha -> the bytes of a TIFF file.

    Strips of more than 4 GB make a BigTIFF file.
    """
    strips, rows = _strips(pixels)
    try:
        head = _directory(pixels, strips, rows, metadata, exif=True)
    except PARSE_ERRORS as error:
        notice(f"EXIF cannot be stored in TIFF and was dropped ({error})")
        head = _directory(pixels, strips, rows, metadata, exif=False)
    return b"".join([head, *strips])
