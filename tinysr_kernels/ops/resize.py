"""resize_bicubic: enlargement by a whole factor with the Keys kernel, as torch's bicubic resize has it.

    out = mul * bicubic(x) + add          a = -0.75, half-pixel centres (align_corners False), no antialias,
                                          no clamp, pixels outside repeat the border

Layouts: x [N,C,H,W] of any floating dtype or uint8 (then mul usually carries the 1/255) and of any strides,
out [N,C,H*factor,W*factor] channels_last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import Cost, check, check_rank, empty_nhwc, nhwc, register, size, wide

SCHEMA = "resize_bicubic(Tensor x, int factor, float mul=1.0, float add=0.0, ScalarType? dtype=None) -> Tensor"


def _out_shape(x: Tensor, factor: int, dtype: torch.dtype | None) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    check(factor >= 1, f"factor must be at least 1, found {factor}")
    check(_dtype(x, dtype).is_floating_point, f"dtype must be floating, found {dtype}")
    n, c, h, w = x.shape
    return n, c, h * factor, w * factor


def _dtype(x: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is not None:
        return dtype
    return x.dtype if x.dtype.is_floating_point else torch.float32


def reference(x: Tensor, factor: int, mul: float = 1.0, add: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """torch's own bicubic interpolation in float32 or wider.

    The result is in `dtype`, which must be floating; by default x's own (float32 for uint8). Raises
    ValueError naming argument, expected and found.
    """
    _, _, height, width = _out_shape(x, factor, dtype)
    result = _dtype(x, dtype)
    u = nhwc(x.to(wide(torch.promote_types(result, x.dtype))))
    y = F.interpolate(u, size=(height, width), mode="bicubic", align_corners=False)
    return nhwc((y * mul + add).to(result))


def fake(x: Tensor, factor: int, mul: float = 1.0, add: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return empty_nhwc(x, _out_shape(x, factor, dtype), _dtype(x, dtype))


def cost(x: Tensor, factor: int, mul: float = 1.0, add: float = 0.0, dtype: torch.dtype | None = None) -> Cost:
    """FLOPs: 2 passes of 4 taps and the affine map per output; bytes of x and the result once."""
    outputs = x.numel() * factor * factor
    return Cost(outputs * 18, size(x) + outputs * _dtype(x, dtype).itemsize)


resize_bicubic = register(SCHEMA, reference, fake, cost)
