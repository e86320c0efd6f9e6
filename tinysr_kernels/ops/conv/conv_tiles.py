"""Launch configurations of conv3x3_kernel, and the launches they lead to: what conv3x3 and upsample_conv share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, cdiv, next_power_of_2
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.conv.kernels import conv_few as conv_few_kernel
from tinysr_kernels.ops.norm import channel_moments
from tinysr_kernels.ops.norm.kernels import norm_silu_prologue as prologue_kernel


@dataclass(frozen=True)
class Config:
    """How a convolution runs. form: "tile" (conv3x3_kernel's docstring), "few" (conv_few_kernel's, of a tile with its
    border; conv3x3 alone), or "library", which ignores the rest.

    pixels and columns: of a tile; outputs: a program; slice: of the reduction, a step; splits: programs at most that
    share a tile's reduction.
    """

    form: str
    pixels: int
    columns: int
    outputs: int
    slice: int
    splits: int
    warps: int
    stages: int


LIBRARY = Config("library", 1, 1, 1, 1, 1, 1, 1)


@dataclass(frozen=True)
class Prologue:
    """A GroupNorm with SiLU before a convolution, from the moments of its input; tensors dense."""

    moments: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float

    @property
    def width(self) -> int:
        """Channels of a group."""
        return self.weight.shape[0] // self.groups

    def scale(self) -> Launch:
        """What each channel's group makes of it, so that a program of many steps need not."""
        n, _, channels = self.moments.shape
        members = next_power_of_2(self.width, least=1)
        block = next_power_of_2(channels, most=max(1024 // members, 16))
        arguments = {
            "moments": self.moments,
            "weight": self.weight,
            "scratch_scale": self.moments.new_empty((n, 2, channels), dtype=torch.float32),
            "eps": self.eps,
            "channels": channels,
            "WIDTH": self.width,
            "MEMBERS": members,
            "CHANNELS": block,
        }
        return Launch(prologue_kernel.scale, (cdiv(channels, block), n), arguments, 4, 1)


@dataclass(frozen=True)
class Tail:
    """What follows the sums of a convolution; tensors dense in their layout."""

    bias: Tensor | None
    residual: Tensor | None
    activation: str
    activate_residual: bool


def heuristic(gpu: Gpu, h: int, w: int, outputs: int, inputs: Sequence[int], itemsize: int, phases: int = 1) -> Config:
    """A tile whose sums fit the registers of its warps, smaller or with a shared reduction where an image is small.

    h, w and outputs: of the result, a phase; inputs: channels of the image and of the 1x1 shortcut's tensors.
    """
    half = itemsize == 2
    # Loads of 16 bytes go past the registers, single channels through them.
    wide = all(c * itemsize % 16 == 0 for c in inputs)
    depths = _depths(inputs, phases)
    block = next_power_of_2(outputs, most=128 if half and wide else 64 if half else 32)
    # Elsewhere slices of 64 cost 160 to 184 registers, where 32 take 128 to 152.
    deep = half and wide and gpu.capability[0] in FROM_SHARED
    step = next_power_of_2(depths[0], most=64 if deep else 32 if half else 16)
    # Larger tiles of float32 spill a register or two on some architecture in Triton 3.6 or 3.7, with 4 warps or 8.
    pixels = 128 if half else 32
    while pixels > 64 and _programs(pixels, block, h, w, outputs, phases) < gpu.multiprocessors:
        pixels //= 2
    steps = sum(cdiv(depth, step) for depth in depths)

    def sharing(block: int) -> int:
        """How many programs share a reduction: what fills the GPU. A part of fewer than 8 steps would mostly wait."""
        programs = _programs(pixels, block, h, w, outputs, phases)
        return max(min(gpu.multiprocessors // programs, steps // 8, MOST_SPLITS), 1)

    # Narrower blocks fill the GPU as well as more parts do, and leave fewer sums to store and add. Each loads all the
    # pixels again, which at 64 outputs are as many bytes as the weights, and at 32 twice as many.
    while block > 64 and sharing(block) > 1:
        block //= 2
    splits = sharing(block)
    # Small tiles have too many addresses for 4 warps but on Hopper, whose products take 64 rows a warpgroup.
    few = half and wide and pixels * block <= 8192 and (pixels > 64 or gpu.capability[0] == 9)
    warps = 4 if few or not half else 8
    return Config("tile", pixels, _columns(pixels, h, w), block, step, splits, warps, 3 if deep else 4)


def _depths(inputs: Sequence[int], phases: int) -> list[int]:
    """How long the reduction over each input is."""
    return [inputs[0] * (9 if phases == 1 else 4), *inputs[1:]]


FROM_SHARED = (9, 10)
"""Major compute capabilities whose tensor cores read both operands from shared memory, not from registers."""

MOST_SPLITS = 16
"""More partial sums than this cost more to add than they save."""


def _columns(pixels: int, h: int, w: int) -> int:
    """Of a tile about as tall as wide, or narrower or flatter as the image is."""
    return next_power_of_2(w, least=1, most=pixels // next_power_of_2(h, least=1, most=min(8, max(pixels // 8, 1))))


def _programs(pixels: int, block: int, h: int, w: int, outputs: int, phases: int) -> int:
    columns = _columns(pixels, h, w)
    return cdiv(h, pixels // columns) * cdiv(w, columns) * cdiv(outputs, block) * phases


def space(
    gpu: Gpu, h: int, w: int, outputs: int, inputs: Sequence[int], itemsize: int, phases: int = 1
) -> Iterator[Config]:
    """The library, and tiles whose sums leave registers for the rest and whose buffers fit the shared memory."""
    yield LIBRARY
    usual = heuristic(gpu, h, w, outputs, inputs, itemsize, phases)
    depth = _depths(inputs, phases)[0]
    steps = (32, 64, 128) if itemsize == 2 else (16, 32)
    sums = 4096 if gpu.capability[0] in FROM_SHARED and itemsize == 2 else 2048
    tiles = itertools.product((64, 128, 256), (32, 64, 128, 256), steps, (4, 8), (1, 2, 3, 4))
    for pixels, most, step, warps, stages in tiles:
        block, step = next_power_of_2(outputs, most=most), next_power_of_2(depth, most=step)
        buffers = (pixels + block) * step * itemsize * stages
        if not 1024 * warps <= pixels * block <= sums * warps or buffers > gpu.shared_limit:
            continue
        for splits in {1, usual.splits, min(2 * usual.splits, MOST_SPLITS)}:
            yield Config("tile", pixels, _columns(pixels, h, w), block, step, splits, warps, stages)


def launches(
    config: Config,
    arguments: Mapping[str, Tensor | None],
    tail: Tail,
    out: Tensor,
    *,
    stride: int = 1,
    enlarge: int = 1,
    take_moments: bool = False,
    prologue: Prologue | None = None,
) -> tuple[Launch, ...]:
    """One launch, or two where programs share a reduction. arguments: conv3x3_kernel.conv's inputs, dense.

    take_moments: a single launch leaves the moments of its tiles (`ops/norm/channel_moments.py`). prologue: one launch more.
    """
    n, o, h, w = out.shape
    x, shortcut, skip = (arguments[name] for name in ("x", "shortcut", "skip"))
    assert x is not None
    _, c, height, width = x.shape
    first, second = (0 if t is None else t.shape[1] for t in (shortcut, skip))
    steps = sum(cdiv(depth, config.slice) for depth in ((4 - enlarge) ** 2 * c, first, second))
    share = cdiv(steps, min(config.splits, steps))
    parts = cdiv(steps, share)
    whole = parts == 1
    rows = config.pixels // config.columns
    tiles = cdiv(h // enlarge, rows) * cdiv(w // enlarge, config.columns)
    scratch = None if whole else x.new_empty((parts, n, h, w, o), dtype=torch.float32)
    before = () if prologue is None else (prologue.scale(),)
    given: dict[str, Any] = {
        **arguments,
        "scratch_scale": before[0].arguments["scratch_scale"] if before else None,
        "norm_bias": None if prologue is None else prologue.bias,
        "QUICK": x.element_size() == 2,
        "bias": tail.bias if whole else None,
        "residual": tail.residual if whole else None,
        "out": out if whole else None,
        "scratch_parts": scratch,
        "scratch_moments": channel_moments.scratch(out, tiles * enlarge**2) if take_moments and whole else None,
        "height": height,
        "width": width,
        "out_height": h,
        "out_width": w,
        "share": share * config.slice,
        "CHANNELS": c,
        "RESULTS": o,
        "FIRST": first,
        "SECOND": second,
        "STRIDE": stride,
        "ENLARGE": enlarge,
        "ACTIVATION": tail.activation if whole else "none",
        "ACTIVATE_RESIDUAL": whole and tail.activate_residual,
        "PIXELS": config.pixels,
        "COLUMNS": config.columns,
        "OUTPUTS": config.outputs,
        "SLICE": config.slice,
        "WIDTH": 1,
    }
    grid = (tiles * cdiv(o, config.outputs) * enlarge**2, parts, n)
    launch = Launch(conv3x3_kernel.conv, grid, given, config.warps, config.stages)
    return (*before, launch) if scratch is None else (*before, launch, *epilogue(scratch, tail, out))


MOST_FEW = 7
"""Results whose nine taps are as many columns of a product as its narrowest efficient tile has twice."""


def few(w: int, outputs: int, channels: int, itemsize: int) -> Config:
    """For as few results as that; pixels as the static checks have shown to spill nothing."""
    columns = next_power_of_2(w + 2, least=4, most=32)
    pixels = 512 if itemsize > 2 and channels % 8 == 0 else 256
    return Config("few", pixels, columns, next_power_of_2(9 * outputs), 32, 1, 8, 1)


def few_launches(
    config: Config, x: Tensor, weight: Tensor, tail: Tail, out: Tensor, prologue: Prologue | None
) -> tuple[Launch, ...]:
    """One launch; everything dense."""
    n, c, h, w = x.shape
    o = out.shape[1]
    width = 1 if prologue is None else prologue.width
    given = {
        "x": x,
        "weight": weight,
        "bias": tail.bias,
        "residual": tail.residual,
        "moments": None if prologue is None else prologue.moments,
        "norm_weight": None if prologue is None else prologue.weight,
        "norm_bias": None if prologue is None else prologue.bias,
        "out": out,
        "norm_eps": 0.0 if prologue is None else prologue.eps,
        "height": h,
        "width": w,
        "CHANNELS": c,
        "RESULTS": o,
        "NORM_WIDTH": width,
        "MEMBERS": next_power_of_2(width, least=1),
        "QUICK": x.element_size() == 2,
        "ACTIVATION": tail.activation,
        "ACTIVATE_RESIDUAL": tail.activate_residual,
        "PIXELS": config.pixels,
        "COLUMNS": config.columns,
        "SLICE": config.slice,
        "PLACES": max(config.outputs, next_power_of_2(9 * o)),
        "OUTPUTS": next_power_of_2(o, least=1),
    }
    grid = (cdiv(h, config.pixels // config.columns - 2) * cdiv(w, config.columns - 2), n)
    return (Launch(conv_few_kernel.few, grid, given, config.warps, config.stages),)


def epilogue(parts: Tensor, tail: Tail, out: Tensor) -> tuple[Launch, ...]:
    """The sum of the parts [parts,N,H,W,O], or of the one that `out` itself holds, with what follows, into out."""
    n, o, h, w = out.shape
    if parts is out and tail.bias is None and tail.residual is None and tail.activation == "none":
        return ()
    block = next_power_of_2(o, most=64)
    pixels = 1024 // block
    arguments = {
        "scratch_parts": parts,
        "bias": tail.bias,
        "residual": tail.residual,
        "out": out,
        "pixels": h * w,
        "RESULTS": o,
        "ACTIVATION": tail.activation,
        "ACTIVATE_RESIDUAL": tail.activate_residual,
        "PARTS": 1 if parts is out else parts.shape[0],
        "PIXELS": pixels,
        "OUTPUTS": block,
    }
    return (Launch(conv3x3_kernel.merge, (cdiv(h * w, pixels) * cdiv(o, block), n), arguments, 4, 1),)


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int, out: Tensor) -> None:
    """The library's convolution into `out`, in float32 where x is, always by the same algorithm."""
    if x.is_cuda:
        # torch.conv2d would write elsewhere, and round float32 to tf32 unless told not to for the whole process.
        torch.ops.aten.cudnn_convolution.out(
            x, weight, [padding] * 2, [stride] * 2, [1, 1], 1, False, True, False, out=out
        )
    else:
        out.copy_(F.conv2d(x, weight, stride=stride, padding=padding))
