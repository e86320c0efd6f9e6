"""Read binary PPM files of more than 8 bits per sample, which Pillow reduces to 8."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import BinaryIO

import numpy as np

from tinysr_kernels.files.reading.decoded import notice_missing
from tinysr_kernels.runtime.images.structure import read_at

_SPACE = rb"(?:[ \t\r\n\f\v]|#[^\r\n]*[\r\n])"
_HEADER = re.compile(rb"P6" + 3 * (_SPACE + rb"+(\d{1,10})") + _SPACE, re.DOTALL)  # one byte of space before the pixels


def read_ppm16(stream: BinaryIO, check: Callable[[int, int], None], allow_truncated: bool) -> np.ndarray | None:
    """A PPM file (P6) with a maximum of 256 to 65535 -> uint16 [H,W,3]; None for any other file.

    check: is called with the size before pixels are read. allow_truncated: fill what is missing with zeros, with a
    notice. Raises OSError for a truncated file.
    """
    stream.seek(0)
    head = _HEADER.match(stream.read(4096))
    if head is None:
        return None
    width, height, top = (int(number) for number in head.groups())
    if not 256 <= top <= 65535 or not width or not height:
        return None
    check(width, height)
    size = width * height * 6
    data = read_at(stream, head.end(), size)
    if len(data) < size:
        if not allow_truncated:
            raise OSError(f"{len(data)} of {size} bytes of pixels")
        notice_missing(height - len(data) // (width * 6), height)
    pixels = np.frombuffer(data.ljust(size, b"\0"), ">u2").reshape(height, width, 3).astype(np.uint32)
    return ((pixels * 65535 + top // 2) // top).clip(0, 65535).astype(np.uint16)
