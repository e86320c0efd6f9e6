"""sepconv_block: three separable convolutions of equal width with their ReLUs and the skip, TinySR's VAE's block.

    h1 = relu(c1(x)), h2 = relu(c2(h1))
    out = relu(c3(h2) + x)          each c as `sepconv` with stride 1, h1 and h2 rounded to x's dtype

Layouts as in `sepconv`: x and out [N,C,H,W] in channels_last memory; of each convolution a depthwise kernel [C,3,3]
with the channels last in memory, a pointwise one [C,C] and a bias [C] or None.

Three launches of sepconv's kernels over whole images, or many more over strips of rows: the first convolution runs a
row ahead of the second and that a row ahead of the third, strip by strip, so that each finds in the L2 what the one
before it has just written. Either way every pixel has the same sums, and the result the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Implementation, Plan, power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.conv import sepconv, sepconv_tiles
from tinysr_kernels.ops.conv.kernels import sepconv as sepconv_kernel
from tinysr_kernels.ops.norm.kernels import norm_silu_prologue as prologue_kernel
from tinysr_kernels.ops.registry import (
    Cost,
    check,
    check_rank,
    check_shape,
    empty_nhwc,
    nhwc,
    plain,
    register,
    size,
)

SCHEMA = (
    "sepconv_block(Tensor x, Tensor depthwise1, Tensor pointwise1, Tensor? bias1, Tensor depthwise2, "
    "Tensor pointwise2, Tensor? bias2, Tensor depthwise3, Tensor pointwise3, Tensor? bias3) -> Tensor"
)
STRIPS = (64, 128, 256)
"""Rows of a strip worth measuring: at 512 columns of 64 channels in half precision 128 rows are 8 MB."""

Weights = tuple[Tensor, Tensor, Tensor | None]
"""Of one convolution: depthwise, pointwise, bias."""


def _check(x: Tensor, *convolutions: Weights) -> None:
    check_rank("x", x, "N,C,H,W")
    c = x.shape[1]
    for i, (depthwise, pointwise, bias) in enumerate(convolutions, 1):
        check_shape(f"depthwise{i}", depthwise, (c, 3, 3))
        check_shape(f"pointwise{i}", pointwise, (c, c))
        check_shape(f"bias{i}", bias, (c,))


def reference(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    bias1: Tensor | None,
    depthwise2: Tensor,
    pointwise2: Tensor,
    bias2: Tensor | None,
    depthwise3: Tensor,
    pointwise3: Tensor,
    bias3: Tensor | None,
) -> Tensor:
    """`sepconv`'s reference three times; mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check(x, (depthwise1, pointwise1, bias1), (depthwise2, pointwise2, bias2), (depthwise3, pointwise3, bias3))
    h = sepconv.reference(x, depthwise1, pointwise1, bias1, activation="relu")
    h = sepconv.reference(h, depthwise2, pointwise2, bias2, activation="relu")
    return sepconv.reference(h, depthwise3, pointwise3, bias3, x, activation="relu")


def fake(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    bias1: Tensor | None,
    depthwise2: Tensor,
    pointwise2: Tensor,
    bias2: Tensor | None,
    depthwise3: Tensor,
    pointwise3: Tensor,
    bias3: Tensor | None,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check(x, (depthwise1, pointwise1, bias1), (depthwise2, pointwise2, bias2), (depthwise3, pointwise3, bias3))
    return empty_nhwc(x, tuple(x.shape))


def cost(
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    bias1: Tensor | None,
    depthwise2: Tensor,
    pointwise2: Tensor,
    bias2: Tensor | None,
    depthwise3: Tensor,
    pointwise3: Tensor,
    bias3: Tensor | None,
) -> Cost:
    """FLOPs of the three convolutions; bytes of every argument and the result once, of what lies between none."""
    weights = (depthwise1, pointwise1, bias1, depthwise2, pointwise2, bias2, depthwise3, pointwise3, bias3)
    c = x.shape[1]
    return Cost(3 * 2 * x.numel() * (9 + c), size(x, *weights) + x.numel() * x.element_size())


@dataclass(frozen=True)
class Config:
    """Launches of sepconv_block. strip: rows that each convolution does at a time, 0 for all of them.

    The rest is sepconv's own configuration, field by field, of each launch.
    """

    strip: int
    form: str
    rows: int
    pixels: int
    channels: int
    outputs: int
    warps: int
    stages: int

    @property
    def convolution(self) -> sepconv_tiles.Config:
        """What each launch runs with."""
        return sepconv_tiles.Config(
            self.form, self.rows, self.pixels, self.channels, self.outputs, self.warps, self.stages
        )


def bucket(x: Tensor, **_: Any) -> str:
    """Calls that share a configuration: dtype, channels, pixels up to a power of two."""
    n, c, h, w = x.shape
    return f"{str(x.dtype).removeprefix('torch.')} {c} {power_of_2(n * h * w)}"


def heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """Whole images, as `sepconv_tiles.heuristic` has them.

    A block of 64 channels at 512x512 writes and reads again two images of 34 MB in half precision. Strips of 128 rows
    could spare an H200 at most the two readings, 16 us at 4.3 TB/s, and take nine launches more, 0.6 to 1.0 us each,
    that fill a quarter as many programs: a choice to be measured. An L2 of 72 MB or more (RTX 4090, B200, RTX 5090)
    holds a whole image between two launches anyway.
    """
    n, c, h, w = x.shape
    return Config(0, **dataclasses.asdict(sepconv_tiles.heuristic(gpu, n, c, c, h, w, x.element_size())))


def skewed(height: int, strip: int) -> Iterator[tuple[int, int, int]]:
    """(number of the convolution, its first row, the row behind its last), in the order of the launches.

    Row y of a convolution needs rows up to y + 1 of the one before it.
    """
    for begin in range(0, height, strip or height):
        end = begin + (strip or height)
        for number in range(3):
            ahead = 2 - number
            first = begin + ahead if begin else 0
            if first < height:
                yield number, first, min(end + ahead, height)


def plan(
    config: Config,
    x: Tensor,
    depthwise1: Tensor,
    pointwise1: Tensor,
    bias1: Tensor | None,
    depthwise2: Tensor,
    pointwise2: Tensor,
    bias2: Tensor | None,
    depthwise3: Tensor,
    pointwise3: Tensor,
    bias3: Tensor | None,
) -> Plan:
    """Three launches, or three a strip; raises what the reference raises. What is not dense is copied once."""
    given = ((depthwise1, pointwise1, bias1), (depthwise2, pointwise2, bias2), (depthwise3, pointwise3, bias3))
    _check(x, *given)
    check(config.strip >= 0, f"strip must not be negative, found {config.strip}")
    x = nhwc(x)
    weights = [
        (sepconv_tiles.taps_last(depthwise).movedim(-1, 0), plain(pointwise, pointwise.dtype), bias)
        for depthwise, pointwise, bias in given
    ]
    images = [x, *(empty_nhwc(x, tuple(x.shape)) for _ in range(3))]
    launches = tuple(
        sepconv_tiles.launch(
            config.convolution,
            images[number],
            *weights[number],
            x if number == 2 else None,
            images[number + 1],
            activation="relu",
            rows=(first, end),
        )
        for number, first, end in skewed(x.shape[2], config.strip)
    )
    return Plan(images[3], launches)


def space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """Whole images in all of sepconv's configurations; strips in those near the heuristic's, of few rows a program."""
    n, c, h, w = x.shape
    for one in sepconv_tiles.space(c, c, w):
        yield Config(0, **dataclasses.asdict(one))
    own = sepconv_tiles.heuristic(gpu, n, c, c, h, w, x.element_size())
    for strip in STRIPS:
        if strip < h:
            for rows in (2, 4, 8, 16):
                yield Config(strip, **dataclasses.asdict(dataclasses.replace(own, rows=rows)))


KERNELS = Implementation(
    Config,
    bucket,
    heuristic,
    plan,
    space,
    (sepconv_tiles.__name__, sepconv_kernel.__name__, prologue_kernel.__name__, device_functions.__name__),
)

sepconv_block = register(SCHEMA, reference, fake, cost, KERNELS)
