"""resize_bicubic: enlargement by a whole factor with the Keys kernel, as torch's bicubic resize has it.

    out = mul * bicubic(x) + add          a = -0.75, half-pixel centres (align_corners False), no antialias,
                                          no clamp, pixels outside repeat the border

Layouts: x [N,C,H,W] of any floating dtype or uint8 (then mul usually carries the 1/255) and of any strides,
out [N,C,H*factor,W*factor] channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_rank
from tinysr_kernels.ops.image.kernels import resize as resize_kernel
from tinysr_kernels.ops.layout import empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

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
    u = nhwc(x.to(compute_dtype(torch.promote_types(result, x.dtype))))
    y = F.interpolate(u, size=(height, width), mode="bicubic", align_corners=False)
    return nhwc((y * mul + add).to(result))


def fake(x: Tensor, factor: int, mul: float = 1.0, add: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return empty_nhwc(x, _out_shape(x, factor, dtype), _dtype(x, dtype))


def cost(x: Tensor, factor: int, mul: float = 1.0, add: float = 0.0, dtype: torch.dtype | None = None) -> Cost:
    """FLOPs: 2 passes of 4 taps and the affine map per output; bytes of x and the result once."""
    outputs = x.numel() * factor * factor
    return Cost(outputs * 18, nbytes(x) + outputs * _dtype(x, dtype).itemsize)


@dataclass(frozen=True)
class Config:
    """A launch of resize_bicubic: neighbouring numbers of the result's rows a program, gaps between rows of x."""

    lanes: int
    steps: int
    warps: int


def bucket(x: Tensor, factor: int, dtype: torch.dtype | None, **_: Any) -> str:
    """Calls that share a configuration: dtypes, factor, numbers of the result a sample up to a power of two."""
    names = (str(t).removeprefix("torch.") for t in (x.dtype, _dtype(x, dtype)))
    return f"{'->'.join(names)} x{factor} {next_power_of_2(x[0].numel() * factor * factor)}"


def rows(x: Tensor, factor: int) -> Config:
    """Two numbers a thread; four gaps a program, of whose seven rows three are read again by the next."""
    return Config(next_power_of_2(x.shape[3] * factor * x.shape[1], least=32, most=256), 4, 4)


def heuristic(gpu: Gpu, x: Tensor, factor: int, **_: Any) -> Config:
    """The same on every GPU."""
    return rows(x, factor)


def plan(config: Config, x: Tensor, factor: int, mul: float, add: float, dtype: torch.dtype | None) -> Plan:
    """The launch; raises what the reference raises. The strides of x are taken as they are."""
    out = empty_nhwc(x, _out_shape(x, factor, dtype), _dtype(x, dtype))
    return Plan(out, (launch(config, x, out, factor, mul, add),))


def launch(
    config: Config, x: Tensor, out: Tensor, factor: int, mul: float, add: float, base: Tensor | None = None
) -> Launch:
    """The enlargement of x into out; with `base`, an image of out's size and any strides, clamp(it) - clamp(base)."""
    n, c, h, w = x.shape
    strides = (0, 0, 0, 0) if base is None else base.stride()
    arguments = {
        "x": x,
        "base": base,
        "out": out,
        "mul": float(mul),
        "add": float(add),
        "height": h,
        "width": w,
        "channels": c,
        "sample_stride": x.stride(0),
        "channel_stride": x.stride(1),
        "row_stride": x.stride(2),
        "column_stride": x.stride(3),
        "base_sample_stride": strides[0],
        "base_channel_stride": strides[1],
        "base_row_stride": strides[2],
        "base_column_stride": strides[3],
        "FACTOR": factor,
        "LANES": config.lanes,
        "STEPS": config.steps,
    }
    # Between h rows and around them lie h + 1 gaps.
    grid = (cdiv(w * factor * c, config.lanes), cdiv(h + 1, config.steps), n)
    return Launch(resize_kernel.enlarge, grid, arguments, config.warps, 1)


def space(gpu: Gpu, x: Tensor, factor: int, **_: Any) -> Iterator[Config]:
    """More and fewer numbers and rows a program."""
    for lanes, steps, warps in itertools.product((128, 256, 512, 1024), (1, 2, 4, 8), (2, 4, 8)):
        yield Config(next_power_of_2(x.shape[3] * factor * x.shape[1], least=32, most=lanes), steps, warps)


KERNELS = Implementation(Config, bucket, heuristic, plan, space, (resize_kernel.__name__, device_functions.__name__))

resize_bicubic = register(SCHEMA, reference, fake, cost, KERNELS)
