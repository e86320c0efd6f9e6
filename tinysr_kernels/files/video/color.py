"""Frames of a film as RGB and back, with one matrix and range, so that sample values keep their meaning.

Also the frame's orientation: the whole display matrix is applied to the pixels, so that results need none.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinysr_kernels.files.video.opening import pyav
from tinysr_kernels.runtime.notices import notice

# ITU-T H.273 matrix coefficients -> swscale's matrices. Players assume one of the first two for untagged videos,
# depending on the frame size.
_BT709, _BT601 = 1, 5
_MATRIX = {1: _BT709, 4: 4, 5: _BT601, 6: _BT601, 7: 7, 9: 9, 10: 9}
_UNSPECIFIED = 2
_SD_HEIGHT = 576
# swscale flags as numbers, because PyAV names them only since 17.1: BICUBIC, FULL_CHR_H_INT, FULL_CHR_H_INP,
# ACCURATE_RND.
_SCALING = 0x4 | 0x2000 | 0x4000 | 0x40000

# H.273 code points whose values look like sRGB: primaries of BT.709, BT.601 and near them, and display-referred curves.
_NEAR_SRGB_PRIMARIES = frozenset([0, 1, _UNSPECIFIED, 4, 5, 6, 7, 22])
_NEAR_SRGB_TRANSFERS = frozenset([0, 1, _UNSPECIFIED, 4, 5, 6, 7, 11, 12, 13, 14, 15])
_NAMES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_DISPLAY = frozenset(["MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL", "DYNAMIC_HDR_PLUS", "DOVI_METADATA"])
_CURVES = {8: "linear", 16: "PQ", 18: "HLG"}


@dataclass(frozen=True)
class Orientation:
    """How stored pixels are turned upright: transposed first, then mirrored."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """[H,W,C] as stored -> upright."""
        if self.transpose:
            pixels = pixels.swapaxes(0, 1)
        if self.flip_y:
            pixels = pixels[::-1]
        if self.flip_x:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels)


def orientation_of(matrix: bytes | None) -> Orientation:
    """The orientation of a display matrix: nine int32 (a b u, c d v, x y w), x' = a x + c y, y' = b x + d y.

    A matrix that also shears or turns by other angles is taken for the nearest of the eight orientations.
    """
    if matrix is None or len(matrix) < 36:
        return Orientation()
    a, b, _, c, d = struct.unpack("=9i", matrix[:36])[:5]
    right = abs(a) + abs(d), abs(b) + abs(c)
    if min(right) > 0 and min(right) * 100 > max(right):
        notice("the film is turned by an angle that is no multiple of 90 degrees; it was turned to the nearest one")
    if right[0] >= right[1]:
        return Orientation(False, a < 0, d < 0)
    return Orientation(True, c < 0, b < 0)


@dataclass(frozen=True)
class FrameFormat:
    """What the first frame states. Color tags are H.273 code points (2: unspecified).

    width, height: as stored. matrix: the conversion matrix in swscale's numbering. tag: the matrix to write to the
    output: the input's, or the assumed one if the input has none. rgb: stored as RGB. bits: per sample. alpha: has
    transparency.
    """

    width: int
    height: int
    matrix: int
    tag: int
    primaries: int
    transfer: int
    full_range: bool
    orientation: Orientation
    rgb: bool
    bits: int
    alpha: bool

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright frame."""
        return (self.height, self.width) if self.orientation.transpose else (self.width, self.height)


def side_data(frame: Any) -> dict[str, Any]:
    """What belongs to a frame besides its pixels, by FFmpeg's names such as "DISPLAYMATRIX"."""
    return {str(side.type).rpartition(".")[2]: side for side in frame.side_data}


def frame_format(frame: Any, context: Any) -> FrameFormat:
    """Read a frame's color tags and orientation. An untagged matrix is chosen by frame size, as players do."""
    form = frame.format
    rgb = bool(form.is_rgb) or form.name in ("pal8", "monow", "monob")
    tagged = int(frame.colorspace)
    fallback = _BT709 if rgb or frame.height > _SD_HEIGHT or frame.width > 1280 else _BT601
    sides = side_data(frame)
    return FrameFormat(
        width=frame.width,
        height=frame.height,
        matrix=fallback if rgb else _MATRIX.get(tagged, fallback),
        tag=fallback if rgb or tagged in (0, _UNSPECIFIED) else tagged,
        primaries=int(frame.color_primaries if context is None else context.color_primaries),
        transfer=int(frame.color_trc if context is None else context.color_trc),
        full_range=int(frame.color_range) == 2,
        orientation=orientation_of(bytes(sides["DISPLAYMATRIX"]) if "DISPLAYMATRIX" in sides else None),
        rgb=rgb,
        bits=max((component.bits for component in form.components), default=8),
        alpha=any(component.is_alpha for component in form.components),
    )


def warn_of_color(form: FrameFormat, frame: Any) -> None:
    """Say once what the network does not know about the colors of a film, whose labels are kept, and what is lost.

    frame: the first one.
    """
    kinds = [_CURVES.get(form.transfer, f"transfer function {form.transfer}")]
    kinds = kinds if form.transfer not in _NEAR_SRGB_TRANSFERS else []
    if form.primaries not in _NEAR_SRGB_PRIMARIES:
        kinds.insert(0, _NAMES.get(form.primaries, f"primaries {form.primaries}"))
    if kinds:
        notice(
            f"the colors are not sRGB ({', '.join(kinds)}): the network, which was trained on sRGB, got the values as "
            "they are; the result keeps their labels"
        )
    if _DISPLAY & side_data(frame).keys():
        notice("the description of the display on which the film was graded (HDR10) was dropped")
    if not form.rgb and form.tag not in _MATRIX:
        notice(f"the color matrix {form.tag} is not supported: the network saw colors through another; it is kept")


class Converter:
    """Converts frames to arrays and back. Not thread-safe: one per thread.

    deep: arrays are uint16 instead of uint8. alpha: they have four channels instead of three.
    """

    def __init__(self, form: FrameFormat, *, deep: bool = False, alpha: bool = False) -> None:
        self.format = form
        self._reformatter = pyav().video.reformatter.VideoReformatter()
        self._range = 2 if form.full_range else 1
        # The matrix of the RGB side is ignored, but PyAV before 17 applies the two only if they differ.
        self._other = _BT601 if form.matrix != _BT601 else _BT709
        self._pixels = {
            (False, False): "rgb24",
            (False, True): "rgba",
            (True, False): "rgb48le",
            (True, True): "rgba64le",
        }[deep, alpha]
        self._resized = False

    def to_rgb(self, frame: Any) -> np.ndarray:
        """A decoded frame -> uint8 or uint16 [H,W,3|4], upright, of the first frame's size."""
        options: dict[str, Any] = {} if self.format.rgb else self._options(to_rgb=True)
        size = self.format.width, self.format.height
        if (frame.width, frame.height) != size:
            if not self._resized:
                notice(f"the frame size changes within the film; all frames were scaled to {size[0]}x{size[1]}")
            self._resized = True
            options.update(width=size[0], height=size[1], interpolation=_SCALING)
        rgb = self._reformatter.reformat(frame, format=self._pixels, **options).to_ndarray()
        return self.format.orientation.apply(rgb)

    def to_yuv(self, pixels: np.ndarray, pixel_format: str) -> Any:
        """uint8 or uint16 [H,W,3|4] -> a frame in the pixel format, such as "yuv420p"."""
        frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=self._pixels)
        frame.colorspace = self.format.matrix  # PyAV 17 rejects BT.2020 as an argument, but copies it from here
        return self._reformatter.reformat(frame, format=pixel_format, **self._options(to_rgb=False))

    def _options(self, *, to_rgb: bool) -> dict[str, Any]:
        matrices, ranges = (self.format.matrix, self._other), (self._range, 2)
        if not to_rgb:
            matrices, ranges = matrices[::-1], ranges[::-1]
        return {
            "src_colorspace": matrices[0],
            "dst_colorspace": matrices[1],
            "src_color_range": ranges[0],
            "dst_color_range": ranges[1],
            "interpolation": _SCALING,
        }
