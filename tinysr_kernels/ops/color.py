"""Colour statistics and the colour fixes that tie the enlarged image to the original's colours.

channel_stats:  per sample and channel, mean and unbiased variance over all pixels.   x [N,C,H,W] -> two [N,C]
affine_clamp:   out = clamp(x * gain + offset, 0, 1), gain and offset [N,C]: the AdaIN colour fix, whose
                statistics become one gain and one offset a channel.
wavelet_fix:    out = clamp(x + L(style - x), 0, 1), L five blurs in turn with [1,2,1]x[1,2,1]/16 dilated by
                2^i, i = 0..4, replicate padding. The high bands of a five-level decomposition telescope, so
                this equals keeping x's details over style's colours at the cost of one blur chain.

Layouts: x, style and the fixed images [N,C,H,W], inputs of any strides, results channels_last.
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
from tinysr_kernels.launch.plan import Implementation, Launch, Plan, blocks, power_of_2
from tinysr_kernels.ops import color_kernel, moments, moments_kernel, tiles
from tinysr_kernels.ops.registry import Cost, check_rank, check_shape, empty_nhwc, nhwc, plain, register, size, wide

WAVELET_LEVELS = 5
STATS_SCHEMA = "channel_stats(Tensor x) -> (Tensor, Tensor)"
AFFINE_SCHEMA = "affine_clamp(Tensor x, Tensor gain, Tensor offset) -> Tensor"
WAVELET_SCHEMA = "wavelet_fix(Tensor x, Tensor style) -> Tensor"


def stats_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, unbiased variance), both [N,C] in float32 or wider; the variance of a single pixel is 0.

    Raises ValueError unless x has four dimensions.
    """
    check_rank("x", x, "N,C,H,W")
    flat = plain(x, wide(x.dtype)).flatten(2)
    variance, mean = torch.var_mean(flat, 2, correction=min(1, flat.shape[2] - 1))
    return mean, variance


def stats_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    check_rank("x", x, "N,C,H,W")
    shape = (x.shape[0], x.shape[1])
    return x.new_empty(shape, dtype=wide(x.dtype)), x.new_empty(shape, dtype=wide(x.dtype))


def stats_cost(x: Tensor) -> Cost:
    """FLOPs: 4 per element; bytes of x once and of the results."""
    return Cost(4 * x.numel(), size(x) + 2 * x.shape[0] * x.shape[1] * wide(x.dtype).itemsize)


def _check_affine(x: Tensor, gain: Tensor, offset: Tensor) -> None:
    check_rank("x", x, "N,C,H,W")
    check_shape("gain", gain, x.shape[:2])
    check_shape("offset", offset, x.shape[:2])


def affine_reference(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check_affine(x, gain, offset)
    u = x.to(wide(x.dtype))
    y = u * gain.to(u.dtype)[:, :, None, None] + offset.to(u.dtype)[:, :, None, None]
    return nhwc(y.clamp(0, 1).to(x.dtype))


def affine_fake(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check_affine(x, gain, offset)
    return empty_nhwc(x, tuple(x.shape))


def affine_cost(x: Tensor, gain: Tensor, offset: Tensor) -> Cost:
    """FLOPs: 2 per element; bytes of every tensor once."""
    return Cost(2 * x.numel(), size(x, gain, offset) + x.numel() * x.element_size())


def _check_wavelet(x: Tensor, style: Tensor) -> None:
    check_rank("x", x, "N,C,H,W")
    check_shape("style", style, x.shape)


def wavelet_reference(x: Tensor, style: Tensor) -> Tensor:
    """Plain PyTorch, in float32 or wider; x and style [N,C,H,W] of one size.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check_wavelet(x, style)
    u = x.to(wide(x.dtype))
    low = style.to(u.dtype) - u
    # Made on the device: a copy from the host cannot be captured in a CUDA graph.
    taps = 0.5 - 0.25 * torch.arange(-1, 2, dtype=u.dtype, device=u.device).abs()
    for level in range(WAVELET_LEVELS):
        low = _blur(low, taps, 2**level)
    return nhwc((u + low).clamp(0, 1).to(x.dtype))


def _blur(x: Tensor, taps: Tensor, dilation: int) -> Tensor:
    """One separable blur of dilated [1,2,1]/4 per axis with replicate padding."""
    c = x.shape[1]
    row = taps.view(1, 1, 1, 3).expand(c, 1, 1, 3)
    column = taps.view(1, 1, 3, 1).expand(c, 1, 3, 1)
    x = F.pad(x, (dilation,) * 4, mode="replicate")
    x = F.conv2d(x, row, groups=c, dilation=dilation)
    return F.conv2d(x, column, groups=c, dilation=dilation)


def wavelet_fake(x: Tensor, style: Tensor) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check_wavelet(x, style)
    return empty_nhwc(x, tuple(x.shape))


def wavelet_cost(x: Tensor, style: Tensor) -> Cost:
    """FLOPs: 5 levels of 2 x 3 taps, the difference and the sum; bytes of every tensor once."""
    return Cost(x.numel() * (WAVELET_LEVELS * 12 + 2), size(x, style) + x.numel() * x.element_size())


@dataclass(frozen=True)
class Config:
    """A launch of an operation on images: numbers (channel_stats: pixels) a program."""

    lanes: int
    warps: int


def bucket(x: Tensor, **_: Any) -> str:
    """Calls that share a configuration: dtype, channels, pixels of a sample up to a power of two."""
    return f"{str(x.dtype).removeprefix('torch.')} {x.shape[1]} {power_of_2(x.shape[2] * x.shape[3])}"


def stats_heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """Whatever the batch, so that a sample's sums have the same order in any."""
    return Config(2048 // power_of_2(x.shape[1], most=64), 4)


def stats_plan(config: Config, x: Tensor) -> Plan:
    """Two launches: moments of blocks of pixels, and their merging. An image not in channels_last is copied once."""
    check_rank("x", x, "N,C,H,W")
    result = (x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32))
    # In float64, as torch sums on a CPU: the image is small, and its statistics shift every pixel of the result.
    parts = moments.take(nhwc(x), config.lanes, config.warps, torch.float64)
    merge = moments.merge(parts.arguments["scratch_moments"], result[0], result[1], correction=1)
    return Plan(result, (parts, merge))


def stats_space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """More and fewer pixels a program."""
    block = power_of_2(x.shape[1], most=64)
    for numbers, warps in itertools.product((1024, 2048, 4096, 8192), (2, 4, 8)):
        yield Config(numbers // block, warps)


def heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """Eight numbers a thread: 16 bytes in half precision."""
    return Config(1024, 4)


def affine_plan(config: Config, x: Tensor, gain: Tensor, offset: Tensor) -> Plan:
    """The launch; raises what the reference raises. Inputs that are not dense in their layout are copied once."""
    _check_affine(x, gain, offset)
    out = empty_nhwc(x, tuple(x.shape))
    numbers = x[0].numel()
    arguments = {
        "x": nhwc(x),
        "gain": plain(gain, gain.dtype),
        "offset": plain(offset, offset.dtype),
        "out": out,
        "numbers": numbers,
        "channels": x.shape[1],
        "LANES": config.lanes,
    }
    grid = (blocks(numbers, config.lanes), x.shape[0])
    return Plan(out, (Launch(color_kernel.affine, grid, arguments, config.warps, 1),))


def affine_space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """More and fewer numbers a program."""
    for lanes, warps in itertools.product((256, 512, 1024, 2048, 4096), (2, 4, 8)):
        yield Config(lanes, warps)


def wavelet_heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """A part of a row: neighbouring programs read its neighbours from the cache."""
    return Config(power_of_2(x.shape[3] * x.shape[1], least=32, most=512), 4)


def wavelet_plan(config: Config, x: Tensor, style: Tensor) -> Plan:
    """A launch for each level; raises what the reference raises. Inputs not in channels_last are copied once."""
    _check_wavelet(x, style)
    out = empty_nhwc(x, tuple(x.shape))
    n, c, h, w = x.shape
    bands = [empty_nhwc(x, tuple(x.shape), torch.float32) for _ in range(2)]
    images = {"x": nhwc(x), "style": nhwc(style)}
    grid = (blocks(w * c, config.lanes), h, n)
    launches = []
    for level in range(WAVELET_LEVELS):
        last = level == WAVELET_LEVELS - 1
        arguments = {
            **images,
            "low": bands[(level - 1) % 2] if level else None,
            "out": out if last else bands[level % 2],
            "height": h,
            "width": w,
            "channels": c,
            "DILATION": 2**level,
            "LAST": last,
            "LANES": config.lanes,
        }
        launches.append(Launch(color_kernel.blur, grid, arguments, config.warps, 1))
    return Plan(out, tuple(launches))


def wavelet_space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """More and fewer numbers a program."""
    for lanes, warps in itertools.product((128, 256, 512, 1024), (2, 4, 8)):
        yield Config(power_of_2(x.shape[3] * x.shape[1], least=32, most=lanes), warps)


_MOMENTS = (moments.__name__, moments_kernel.__name__)
_COLOR = (color_kernel.__name__, tiles.__name__)
STATS = Implementation(Config, bucket, stats_heuristic, stats_plan, stats_space, _MOMENTS)
AFFINE = Implementation(Config, bucket, heuristic, affine_plan, affine_space, _COLOR)
WAVELET = Implementation(Config, bucket, wavelet_heuristic, wavelet_plan, wavelet_space, _COLOR)

channel_stats = register(STATS_SCHEMA, stats_reference, stats_fake, stats_cost, STATS)
affine_clamp = register(AFFINE_SCHEMA, affine_reference, affine_fake, affine_cost, AFFINE)
wavelet_fix = register(WAVELET_SCHEMA, wavelet_reference, wavelet_fake, wavelet_cost, WAVELET)
