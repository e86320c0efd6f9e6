"""input_conv: the first convolution of a network, on the image itself, with a constant border.

    out[n,o,y,x] = bias[o] + sum_{c,i,j} weight[o,c,i,j] * p[n,c, s*y+i, s*x+j]

p is x surrounded by `padding` pixels of value `border`. PixelUnshuffle(r) followed by a 3x3 convolution is
the 3r x 3r convolution of stride r and padding r; a network that wants 2u-1 of an image u in [0,1] has the
map folded into weight and bias, and its zero padding then is the border value 0.5 of u.
Layouts: x [N,C,H,W] (any strides) of any floating dtype or uint8, which holds 255 times the image, weight [O,C,K,K],
out [N,O,(H+2p-K)/s+1,(W+2p-K)/s+1] channels_last, of the weight's dtype.
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
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.conv.kernels import input_conv as input_conv_kernel
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype, epilogue
from tinysr_kernels.ops.registry import Implementation, register

SCHEMA = (
    "input_conv(Tensor x, Tensor weight, Tensor? bias=None, int stride=1, int padding=1, float border=0.0) -> Tensor"
)


def _out_shape(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    check_rank("weight", weight, "O,C,K,K")
    n, c, h, w = x.shape
    o, k = weight.shape[0], weight.shape[2]
    check_shape("weight", weight, (o, c, k, k))
    check_shape("bias", bias, (o,))
    check(stride >= 1, f"stride must be at least 1, found {stride}")
    check(padding >= 0, f"padding must be at least 0, found {padding}")
    smallest = k - 2 * padding
    check(min(h, w) >= smallest, f"x must be at least {smallest} pixels per side, found {h}x{w}")
    return n, o, (h + 2 * padding - k) // stride + 1, (w + 2 * padding - k) // stride + 1


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    border: float = 0.0,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    The image is rounded to the weight's dtype. Raises ValueError naming argument, expected and found.
    """
    _out_shape(x, weight, bias, stride, padding)
    u = (
        x.to(compute_dtype(weight.dtype)) / 255
        if x.dtype == torch.uint8
        else x.to(weight.dtype).to(compute_dtype(weight.dtype))
    )
    u = F.pad(u, (padding,) * 4, value=border)
    y = F.conv2d(nhwc(u), nhwc(weight.to(u.dtype)), stride=stride)
    return epilogue(y, bias, None, "none", True, weight.dtype)


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    border: float = 0.0,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return empty_nhwc(x, _out_shape(x, weight, bias, stride, padding), weight.dtype)


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    border: float = 0.0,
) -> Cost:
    """FLOPs of the convolution; bytes of every tensor once."""
    n, o, h, w = _out_shape(x, weight, bias, stride, padding)
    flops = 2 * n * h * w * weight.numel()
    return Cost(flops, nbytes(x, weight, bias) + n * o * h * w * weight.element_size())


@dataclass(frozen=True)
class Config:
    """A launch of input_conv: pixels of the result and outputs of a program; slice of the patch, a product."""

    pixels: int
    outputs: int
    slice: int
    warps: int


def bucket(x: Tensor, weight: Tensor, stride: int, padding: int, **_: Any) -> str:
    """Calls that share a configuration: dtypes, shape of the weight, pixels of the result up to a power of two."""
    _n, o, h, w = _out_shape(x, weight, None, stride, padding)
    kind = f"{x.shape[1]}x{weight.shape[2]}x{weight.shape[2]}->{o} s{stride}"
    names = "->".join(str(t.dtype).removeprefix("torch.") for t in (x, weight))
    return f"{names} {kind} {next_power_of_2(h * w)}"


def heuristic(gpu: Gpu, x: Tensor, weight: Tensor, **_: Any) -> Config:
    """A patch is shallow: the store of the result is what counts."""
    outputs = next_power_of_2(weight.shape[0], most=64)
    half = weight.element_size() == 2
    return Config(64 if half else 32, outputs, next_power_of_2(weight[0].numel(), most=32 if half else 16), 4)


def plan(
    config: Config, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, border: float
) -> Plan:
    """The launch; raises what the reference raises. The strides of x are taken as they are."""
    n, o, h, w = _out_shape(x, weight, bias, stride, padding)
    out = empty_nhwc(x, (n, o, h, w), weight.dtype)
    arguments = {
        "x": x,
        "weight": nhwc(weight),
        "bias": None if bias is None else contiguous_as(bias, bias.dtype),
        "out": out,
        "border": float(border),
        "height": x.shape[2],
        "width": x.shape[3],
        "out_height": h,
        "out_width": w,
        "outputs": o,
        "sample_stride": x.stride(0),
        "channel_stride": x.stride(1),
        "row_stride": x.stride(2),
        "column_stride": x.stride(3),
        "STRIDE": stride,
        "PADDING": padding,
        "CHANNELS": x.shape[1],
        "SIDE": weight.shape[2],
        "PIXELS": config.pixels,
        "OUTPUTS": config.outputs,
        "SLICE": config.slice,
    }
    grid = (cdiv(h * w, config.pixels), cdiv(o, config.outputs), n)
    return Plan(out, (Launch(input_conv_kernel.convolve, grid, arguments, config.warps, 1),))


def space(gpu: Gpu, x: Tensor, weight: Tensor, **_: Any) -> Iterator[Config]:
    """Tiles around the heuristic's."""
    half = weight.element_size() == 2
    for pixels, outputs, slice_, warps in itertools.product(
        (32, 64, 128), (32, 64, 128), (16, 32, 64) if half else (16,), (2, 4, 8)
    ):
        if pixels * outputs <= 2048 * warps:
            yield Config(pixels, next_power_of_2(weight.shape[0], most=outputs), slice_, warps)


KERNELS = Implementation(
    Config, bucket, heuristic, plan, space, (input_conv_kernel.__name__, device_functions.__name__)
)

input_conv = register(SCHEMA, reference, fake, cost, KERNELS)
