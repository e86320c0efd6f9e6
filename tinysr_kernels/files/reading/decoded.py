"""What a reader hands back: pixels as stored, and an image that carries their metadata."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.images.metadata import PARSE_ERRORS
from tinysr_kernels.runtime.notices import notice


def damaged(path: Path, form: str, error: BaseException, *, partial: bool = False) -> InputError:
    """The error for a file that a decoder gave up on. partial: whether a part of it could be decoded."""
    remedy = "; --allow-truncated (allow_truncated=True) decodes what there is" if partial else ""
    reason = str(error)[:300] or type(error).__name__
    return InputError(f"{path}: corrupt or truncated {form} file: {reason}{remedy}")


def notice_missing(rows: int, height: int) -> None:
    """Say what a file that was decoded in part lacks."""
    notice(f"the file is damaged or truncated: {rows} of {height} rows are missing or incomplete")


@dataclass(frozen=True)
class Decoded:
    """pixels: a loaded PIL image, or uint16 [H,W,C] with C = 2 gray + alpha, 3 RGB, 4 RGB + alpha.

    carrier: the image whose EXIF, XMP, ICC profile and resolution belong to the pixels. upright: whether the
    orientation has been applied to them.
    """

    pixels: Image.Image | np.ndarray
    carrier: Image.Image
    upright: bool = False


class TagCarrier(Image.Image):
    """The metadata of one directory of a TIFF file, for pixels that another decoder reads.

    `tag_v2` holds its tags, `info` the profile, packet and resolution, as in an image that Pillow opens. The stream
    must stay open until the metadata are collected.
    """

    format = "TIFF"

    def __init__(self, stream: BinaryIO, offset: int) -> None:
        """offset: of the directory in the file."""
        super().__init__()
        self.tag_v2 = ImageFileDirectory_v2()
        self._tags = Image.Exif()
        try:
            stream.seek(0)
            self.tag_v2 = ImageFileDirectory_v2(_header(stream))  # fails for BigTIFF in big-endian order
            stream.seek(offset)
            self.tag_v2.load(stream)
            self._tags.bigtiff = self.tag_v2._bigtiff
            self._tags.endian = self.tag_v2._endian
            self._tags.load_from_fp(stream, offset)
            self.info = _info(self.tag_v2)
        except PARSE_ERRORS as error:
            notice(f"the metadata of the TIFF file cannot be read and were dropped ({error})")

    def getexif(self) -> Image.Exif:
        """The tags of the directory, with those of its EXIF and GPS directories."""
        return self._tags


def _header(stream: BinaryIO) -> bytes:
    head = stream.read(8)
    return head + stream.read(8) if 43 in head[2:4] else head


def _info(tags: ImageFileDirectory_v2) -> dict[str | tuple[int, int], object]:
    info: dict[str | tuple[int, int], object] = {}
    profile, packet = tags.get(34675), tags.get(700)
    if isinstance(profile, bytes):
        info["icc_profile"] = profile
    packet = packet[0] if isinstance(packet, tuple) and len(packet) == 1 else packet
    if isinstance(packet, (bytes, str)):
        info["xmp"] = packet.encode("utf-8", "replace") if isinstance(packet, str) else packet
    factor = {2: 1.0, 3: 2.54}.get(tags.get(296, 2))  # dots per inch, dots per centimeter
    if factor and 282 in tags and 283 in tags:
        info["dpi"] = (float(tags[282]) * factor, float(tags[283]) * factor)
    return info


def straight_color(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Color multiplied by alpha -> color, rounded to nearest. uint8 or uint16 [H,W,C] and [H,W,1]."""
    top = np.iinfo(color.dtype).max
    wide = alpha.astype(np.uint64)
    return np.minimum((color * np.uint64(top) + wide // 2) // np.maximum(wide, 1), top).astype(color.dtype)
