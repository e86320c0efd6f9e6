"""Launch configurations of the separable convolutions, and their launches; shared by `sepconv` and `sepconv_block`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, blocks, power_of_2
from tinysr_kernels.ops.conv.kernels import sepconv as sepconv_kernel
from tinysr_kernels.ops.norm.channel_moments import scratch
from tinysr_kernels.ops.registry import check, nhwc, plain

MOST_ROWS = 32
"""Rows of a program of `march`, which reads two more than it writes: a sixteenth too much."""


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


@dataclass(frozen=True)
class Norm:
    """GroupNorm of the input: moments [N,2,C], weight and bias [C], number of groups, eps."""

    moments: Tensor
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float


def heuristic(gpu: Gpu, n: int, c: int, o: int, h: int, w: int, itemsize: int, norm: bool = False) -> Config:
    """`march` where a program's channels fit the registers of its warps, several programs to a multiprocessor.

    A thread of `march` holds 16 values of a row, in vectors of 8 channels: three float32 sums of each, 48 registers,
    and 24 for the taps of one kernel column. 32 pixels of 64 channels are so a program of 4 warps, in 104 to 144
    registers: three or four to a multiprocessor, with 12 to 16 KB of a row each on their way from memory. On Hopper,
    whose warpgroup products take 64 rows, it is 64 pixels for 8 warps in 112 to 116 registers, two programs and 16 KB;
    an H200 wants about 11 KB (2.2 TB/s of reads, 0.7 us, 132 multiprocessors), others less. All nine taps in
    registers take 72, hence 230 to 250 in all, one program of 8 warps and 8 KB. No stages of copies: a copy to shared
    memory passes the L1 by, and each of a row's three shifts (`tile`: of nine) would come from the L2. `tile` takes
    80 to 111 registers with 8 warps, and all 255 with 4. norm: whether the input is normalised, which takes center,
    gain and shift of every channel besides; threads then hold half as many values.
    """
    block = power_of_2(c)
    outputs = power_of_2(o, most=64)
    if block > 128 or w < 16:
        # Steps of 32 channels would spill a few words at 64 and 80 registers.
        return Config("tile", 1, 16 if norm else 32, min(block, 32 if norm else 16), outputs, 4 if norm else 8, 1)
    tile, warps, resident = 2048, 4, 3
    if c % 8 or itemsize > 2:
        # Narrower vectors have more addresses, and a product of float32 holds its operands in registers.
        tile, warps = 1024, 8 if norm or block > 64 else 4
    elif norm:
        warps = 8
    elif gpu.capability[0] == 9 and block <= 64 <= w:
        tile, warps, resident = 4096, 8, 2
    pixels = power_of_2(min(tile // block, w), most=64)
    # One wave of programs, of few rows where the image is too small to fill it.
    across = n * blocks(w, pixels) * blocks(o, outputs)
    strips = max(resident * gpu.multiprocessors // across, 1)
    return Config("march", min(blocks(h, strips), MOST_ROWS), pixels, block, outputs, warps, 1)


def space(c: int, o: int, w: int) -> Iterator[Config]:
    """Both forms, where march can hold the channels; tiles around the heuristic's, in more and fewer rows."""
    block, outputs = power_of_2(c), power_of_2(o, most=64)
    for pixels, warps in itertools.product((16, 32, 64), (4, 8)):
        if block <= 128:
            for rows in (2, 4, 8, 11, 16, 22, 32):
                yield Config("march", rows, pixels, block, outputs, warps, 1)
        for channels, stages in itertools.product((16, 32, 64), (1, 2, 3)):
            yield Config("tile", 1, pixels, min(block, channels), outputs, warps, stages)


def taps_last(depthwise: Tensor) -> Tensor:
    """[C,3,3] -> [3,3,C], contiguous: no copy of what networks hold."""
    return depthwise.movedim(0, -1).contiguous()


def launch(
    config: Config,
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    *,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    activation: str = "none",
    activate_residual: bool = True,
    norm: Norm | None = None,
    take_moments: bool = False,
    rows: tuple[int, int] | None = None,
) -> Launch:
    """The launch that computes rows [first, end) of `out` (all, if None). ValueError for a form that cannot.

    take_moments: leaves `scratch_moments` of the result (`ops/norm/channel_moments.py`). What is not dense in its layout is copied.
    """
    n, o, h, w = out.shape
    _, c, height, width = x.shape
    enlarge = 2 if upsample else 1
    first, end = rows or (0, h)
    depths = [0 if t is None else t.shape[1] for t in (shortcut, skip)]
    # The product runs in the widest dtype of its operands; networks give them all the same.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (x, pointwise, shortcut, skip) if t is not None))
    group = 1 if norm is None else c // norm.groups
    arguments: dict[str, Any] = {
        "x": nhwc(x),
        "depthwise": taps_last(depthwise),
        "pointwise": plain(pointwise, dtype),
        "bias": None if bias is None else plain(bias, bias.dtype),
        "residual": None if residual is None else nhwc(residual),
        "shortcut": None if shortcut is None else nhwc(shortcut),
        "skip": None if skip is None else nhwc(skip),
        "shortcut_weight": None if shortcut_weight is None else plain(shortcut_weight, dtype),
        "norm_moments": None if norm is None else plain(norm.moments, norm.moments.dtype),
        "norm_weight": None if norm is None else plain(norm.weight, norm.weight.dtype),
        "norm_bias": None if norm is None else plain(norm.bias, norm.bias.dtype),
        "out": out,
        "scratch_moments": None,
        "norm_eps": 0.0 if norm is None else norm.eps,
        "first_row": first,
        "end_row": end,
        "height": height * enlarge,
        "width": width * enlarge,
        "out_height": h,
        "out_width": w,
        "CHANNELS": c,
        "RESULTS": o,
        "FIRST": depths[0],
        "SECOND": depths[1],
        "GROUP": group,
        "MEMBERS": power_of_2(group, least=1),
        "STRIDE": stride,
        "ENLARGE": enlarge,
        "ACTIVATION": activation,
        "ACTIVATE_RESIDUAL": activate_residual,
        "PIXELS": config.pixels,
        "STEP": config.channels,
        "OUTPUTS": config.outputs,
        # Products of float32 run without tensor cores, from registers.
        "SLICE": power_of_2(max(depths), most=64 if dtype.itemsize == 2 else 16),
    }
    if config.form == "march":
        check(config.channels >= c, f"march needs at least {c} channels a step, found {config.channels}")
        strips = blocks(end - first, config.rows) * blocks(w, config.pixels)
        kernel, arguments["ROWS"] = sepconv_kernel.march, config.rows
    else:
        strips = blocks((end - first) * w, config.pixels)
        kernel, arguments["STAGES"] = sepconv_kernel.tile, config.stages
    if take_moments:
        arguments["scratch_moments"] = scratch(out, strips)
    grid = (strips, blocks(o, config.outputs), n)
    return Launch(kernel, grid, arguments, config.warps, config.stages)
