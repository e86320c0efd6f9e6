"""sepconv: a depthwise 3x3 and a pointwise 1x1 convolution in one operator, the depthwise result not stored.

    d[n,c,y,x] = sum_{i,j} depthwise[c,i,j] * u[n,c, s*y+i-1, s*x+j-1]     u = x, or x enlarged nearest x2
    v[n,o,y,x] = sum_c pointwise[o,c] * d[n,c,y,x]
               + sum_k shortcut_weight[o,k] * concat(shortcut, skip)[n,k,y,x]
    out        = act(v + bias + residual)   or   act(v + bias) + residual

Zero padding of one pixel (of u). Layouts: activations [N,C,H,W] in channels_last memory, depthwise [C,3,3],
pointwise [O,C]. The separable convolutions are those of TinySR's VAE (arXiv 2508.17434, section 3.2).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Implementation, Launch, Plan, blocks, power_of_2, programs_wanted
from tinysr_kernels.ops import sepconv_kernel, tiles
from tinysr_kernels.ops.moments import merged, register_with_moments, scratch
from tinysr_kernels.ops.registry import (
    Cost,
    check,
    check_choice,
    check_epilogue,
    check_rank,
    check_shape,
    check_shortcut,
    empty_nhwc,
    finish,
    nhwc,
    plain,
    register,
    rows,
    shortcut_1x1,
    size,
    wide,
)

SCHEMA = (
    "sepconv(Tensor x, Tensor depthwise, Tensor pointwise, Tensor? bias=None, Tensor? residual=None, "
    "Tensor? shortcut=None, Tensor? skip=None, Tensor? shortcut_weight=None, int stride=1, "
    'bool upsample=False, str activation="none", bool activate_residual=True) -> Tensor'
)


def _out_shape(x: Tensor, pointwise: Tensor, stride: int, upsample: bool) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    if upsample:
        h, w = 2 * h, 2 * w
    return n, pointwise.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1


def _check(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shortcut: Tensor | None,
    skip: Tensor | None,
    shortcut_weight: Tensor | None,
    stride: int,
    upsample: bool,
    activation: str,
) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    c = x.shape[1]
    check_shape("depthwise", depthwise, (c, 3, 3))
    check_rank("pointwise", pointwise, "O,C")
    check_shape("pointwise", pointwise, (pointwise.shape[0], c))
    check_choice("stride", stride, (1, 2))
    out = _out_shape(x, pointwise, stride, upsample)
    check_epilogue(out, bias, residual, activation)
    check_shortcut(out, shortcut, skip, shortcut_weight)
    return out


def reference(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    activation: str = "none",
    activate_residual: bool = True,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check(
        x,
        depthwise,
        pointwise,
        bias,
        residual,
        shortcut,
        skip,
        shortcut_weight,
        stride,
        upsample,
        activation,
    )
    u = nhwc(x.to(wide(x.dtype)))
    if upsample:
        u = F.interpolate(u, scale_factor=2, mode="nearest")
    d = F.conv2d(u, plain(depthwise, u.dtype)[:, None], stride=stride, padding=1, groups=x.shape[1])
    y = empty_nhwc(d, (*_out_shape(x, pointwise, stride, upsample),))
    torch.mm(rows(nhwc(d)), plain(pointwise, u.dtype).t(), out=rows(y))
    y = shortcut_1x1(y, shortcut, skip, shortcut_weight)
    return finish(y, bias, residual, activation, activate_residual, x.dtype)


def fake(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    activation: str = "none",
    activate_residual: bool = True,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    out = _check(
        x,
        depthwise,
        pointwise,
        bias,
        residual,
        shortcut,
        skip,
        shortcut_weight,
        stride,
        upsample,
        activation,
    )
    return empty_nhwc(x, out)


def cost(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    activation: str = "none",
    activate_residual: bool = True,
) -> Cost:
    """FLOPs of the two convolutions and the shortcut; bytes of every tensor once."""
    n, o, h, w = _out_shape(x, pointwise, stride, upsample)
    k = 0 if shortcut_weight is None else shortcut_weight.shape[1]
    c = x.shape[1]
    flops = 2 * n * h * w * (9 * c + o * (c + k))
    moved = size(x, depthwise, pointwise, bias, residual, shortcut, skip, shortcut_weight)
    return Cost(flops, moved + n * o * h * w * x.element_size())


@dataclass(frozen=True)
class Config:
    """A launch of sepconv. form: "march" (channels covers all input channels) or "tile" (sepconv_kernel's docstring).

    rows (march alone) and pixels: of the result, a program; channels: of the input, a step; outputs: a program.
    """

    form: str
    rows: int
    pixels: int
    channels: int
    outputs: int
    warps: int
    stages: int


def bucket(x: Tensor, pointwise: Tensor, shortcut: Tensor | None, stride: int, upsample: bool, **_: Any) -> str:
    """Calls that share a configuration: dtype, channels, pixels of the result up to a power of two, variant."""
    n, o, h, w = _out_shape(x, pointwise, stride, upsample)
    variant = f"{'up' if upsample else f's{stride}'}{'' if shortcut is None else '+1x1'}"
    return f"{str(x.dtype).removeprefix('torch.')} {x.shape[1]}->{o} {power_of_2(n * h * w)} {variant}"


def heuristic(gpu: Gpu, x: Tensor, pointwise: Tensor, stride: int, upsample: bool, **_: Any) -> Config:
    """Enough programs for the GPU, and a tile of sums that fits the registers of its warps."""
    n, o, h, w = _out_shape(x, pointwise, stride, upsample)
    c = power_of_2(x.shape[1])
    outputs = power_of_2(o, most=64)
    if c > 128 or w < 16:
        return Config("tile", 1, 32, min(c, 32), outputs, 4, 2)
    # Vectors of 16 bytes, and values of 16 bits, leave registers for a larger tile.
    tile = 4096 // (1 if x.element_size() == 2 else 2) // (1 if x.shape[1] % 8 == 0 else 2) // (1 if c <= 64 else 2)
    pixels = power_of_2(min(tile // c, w), most=64)
    rows = 16
    while rows > 1 and n * blocks(h, rows) * blocks(w, pixels) * blocks(o, outputs) < programs_wanted(gpu):
        rows //= 2
    # Rows are asked for one ahead of their use: a row takes about as long as the way to memory.
    return Config("march", rows, pixels, c, outputs, 8 if pixels * c >= 1024 else 4, 2)


def moments_heuristic(gpu: Gpu, **arguments: Any) -> Config:
    """Half the columns: the moments of a strip take registers too."""
    config = heuristic(gpu, **arguments)
    return replace(config, pixels=max(config.pixels // 2, 16)) if config.form == "march" else config


def plan(
    config: Config,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shortcut: Tensor | None,
    skip: Tensor | None,
    shortcut_weight: Tensor | None,
    stride: int,
    upsample: bool,
    activation: str,
    activate_residual: bool,
    moments: bool = False,
) -> Plan:
    """The launch; raises what the reference raises. Inputs that are not dense in their layout are copied once.

    moments: the result's too, from one launch more (`ops/moments.py`).
    """
    n, o, h, w = _check(
        x, depthwise, pointwise, bias, residual, shortcut, skip, shortcut_weight, stride, upsample, activation
    )
    out = empty_nhwc(x, (n, o, h, w))
    _, c, height, width = x.shape
    enlarge = 2 if upsample else 1
    depths = [0 if t is None else t.shape[1] for t in (shortcut, skip)]
    # The product runs in the widest dtype of its operands; networks give them all the same.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (x, pointwise, shortcut, skip) if t is not None))
    arguments = {
        "x": nhwc(x),
        "depthwise": plain(depthwise, depthwise.dtype),
        "pointwise": plain(pointwise, dtype),
        "bias": None if bias is None else plain(bias, bias.dtype),
        "residual": None if residual is None else nhwc(residual),
        "shortcut": None if shortcut is None else nhwc(shortcut),
        "skip": None if skip is None else nhwc(skip),
        "shortcut_weight": None if shortcut_weight is None else plain(shortcut_weight, dtype),
        "out": out,
        "scratch_moments": None,
        "height": height * enlarge,
        "width": width * enlarge,
        "out_height": h,
        "out_width": w,
        "channels": c,
        "outputs": o,
        "first_depth": depths[0],
        "second_depth": depths[1],
        "STRIDE": stride,
        "ENLARGE": enlarge,
        "ACTIVATION": activation,
        "ACTIVATE_RESIDUAL": activate_residual,
        "PIXELS": config.pixels,
        "CHANNELS": config.channels,
        "OUTPUTS": config.outputs,
        # Products of float32 run without tensor cores, from registers.
        "SLICE": power_of_2(max(depths), most=64 if dtype.itemsize == 2 else 16),
        "STAGES": config.stages,
    }
    if config.form == "march":
        check(config.channels >= c, f"march needs at least {c} channels a step, found {config.channels}")
        strips = blocks(h, config.rows) * blocks(w, config.pixels)
        kernel, arguments["ROWS"] = sepconv_kernel.march, config.rows
    else:
        strips = blocks(h * w, config.pixels)
        kernel = sepconv_kernel.tile
    if moments:
        arguments["scratch_moments"] = scratch(out, strips)
    launch = Launch(kernel, (strips, blocks(o, config.outputs), n), arguments, config.warps, config.stages)
    return merged(Plan(out, (launch,))) if moments else Plan(out, (launch,))


def space(gpu: Gpu, x: Tensor, pointwise: Tensor, **_: Any) -> Iterator[Config]:
    """Both forms, where march can hold the channels; tiles around the heuristic's, in more and fewer rows."""
    c, outputs = power_of_2(x.shape[1]), power_of_2(pointwise.shape[0], most=64)
    for pixels, warps in itertools.product((16, 32, 64), (4, 8)):
        if c <= 128:
            for rows, stages in itertools.product((4, 8, 16, 32), (1, 2)):
                yield Config("march", rows, pixels, c, outputs, warps, stages)
        for channels, stages in itertools.product((16, 32, 64), (1, 2, 3)):
            yield Config("tile", 1, pixels, min(c, channels), outputs, warps, stages)


KERNELS = Implementation(Config, bucket, heuristic, plan, space, (sepconv_kernel.__name__, tiles.__name__))

sepconv = register(SCHEMA, reference, fake, cost, KERNELS)
sepconv_moments = register_with_moments(sepconv, SCHEMA, fake, moments_heuristic)
