"""The size of a result: the network's own factor, or another one by an antialiased resize of the network's image."""

from __future__ import annotations

import math
import numbers
import operator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels.errors import InputError

MOST = 8
"""The largest factor per side: beyond it the resize would invent everything."""
LARGEST_SIDE = (1 << 31) - 1
"""Pixels per side that image formats and libraries can state."""
_CUDA_REDUCTION = 16
"""PyTorch's antialiased kernel for CUDA keeps the filter in shared memory, which a larger reduction may not fit."""


@dataclass(frozen=True)
class Target:
    """The size wanted of a result, in one of three ways; with none of them the network's own factor.

    scale: a factor for both sides, in (0, 8]. size: (width, height) in pixels, of any aspect ratio. longest: the
    longer side in pixels; the aspect ratio is kept. Raises InputError for several of them or for other values.
    """

    scale: float | None = None
    size: tuple[int, int] | None = None
    longest: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("scale", "size", "longest") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} exclude each other; give one")
        if self.scale is not None:
            object.__setattr__(self, "scale", _scale(self.scale))
        if self.size is not None:
            object.__setattr__(self, "size", _size(self.size))
        if self.longest is not None:
            object.__setattr__(self, "longest", _side("longest", self.longest))

    def options(self) -> dict[str, Any]:
        """The one that is given, by its name, as the parameters of a compiled model take it."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def output(self, width: int, height: int, upscale: int) -> tuple[int, int]:
        """(width, height) of the result of an image of this size, for a network that enlarges `upscale` times.

        Fractions are rounded to nearest, halves up, to at least one pixel. Raises InputError for a size that is more
        than 8 times the image's along a side.
        """
        if self.scale is not None:
            factor = Fraction(repr(self.scale))  # as written: 0.145 times 100 is 14.5, not 14.499999999999998
            return _rounded(width * factor), _rounded(height * factor)
        wanted = self.size
        if self.longest is not None:
            factor = Fraction(self.longest, max(width, height))
            wanted = _rounded(width * factor), _rounded(height * factor)
        if wanted is None:
            return width * upscale, height * upscale
        if wanted[0] > MOST * width or wanted[1] > MOST * height:
            raise InputError(
                f"{width}x{height} cannot become {wanted[0]}x{wanted[1]}: the most is {MOST} times per side, "
                f"{MOST * width}x{MOST * height}"
            )
        return wanted


NATIVE = Target()
"""The network's own factor."""


def _rounded(value: Fraction) -> int:
    return max(math.floor(value + Fraction(1, 2)), 1)


def _scale(value: Any) -> float:
    factor = math.nan
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        with suppress(OverflowError):
            factor = float(value)
    if not 0 < factor <= MOST:
        raise InputError(f"scale must be a number above 0 and at most {MOST}, found {_short(value)}")
    return factor


def _size(value: Any) -> tuple[int, int]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__") or len(value) != 2:
        raise InputError(f"size must be (width, height) in pixels, found {_short(value)}")
    return _side("width", value[0]), _side("height", value[1])


def _side(name: str, value: Any) -> int:
    try:
        side = operator.index(value)
    except TypeError:
        side = 0
    if not 1 <= side <= LARGEST_SIDE or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number of pixels, 1 to {LARGEST_SIDE}, found {_short(value)}")
    return side


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def resample(image: Tensor, size: tuple[int, int]) -> Tensor:
    """image [N,C,H,W], float -> [N,C,height,width], antialiased bicubic as Pillow's (a = -0.5); size: (width, height).

    On the stored, gamma-encoded values, as is usual for photographs. The result may overshoot [0,1] slightly.
    """
    width, height = size
    if tuple(image.shape[-2:]) == (height, width):
        return image
    if image.is_cuda and max(image.shape[-2] / height, image.shape[-1] / width) > _CUDA_REDUCTION:
        return resample(image.cpu(), size).to(image.device)
    return F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False, antialias=True)
