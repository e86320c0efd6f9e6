"""wavelet_fix: the details of x over the low frequencies of style, the original image.

    out = clamp(u + L(bicubic(style) - u), 0, 1)

u and the bicubic enlargement, Pillow's (`resize.py`), are clamped to [0,1]. L: five blurs in sequence with
[1,2,1]x[1,2,1]/16 dilated by 2^i, i = 0..4, replicate padding. The high bands of a five-level decomposition telescope,
so this equals x's high bands over style's lowest band at the cost of one blur chain.

Also returns flags [N,H] that are True where all of a row of x was finite. Layouts as in `ops/image/color.py`:
x [N,C,H,W], style [N,C,h,w] with H = factor * h and W = factor * w.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv
from tinysr_kernels.ops.call import Cost, register
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.image.color import ColorFix, in_unit_range, is_dense, is_finite, row_block, strides_of
from tinysr_kernels.ops.image.kernels import wavelet as kernels
from tinysr_kernels.ops.image.resize import ResizeBicubic
from tinysr_kernels.ops.layout import empty_nhwc
from tinysr_kernels.ops.library_math import conv2d
from tinysr_kernels.ops.reference_math import compute_dtype

LEVELS = 5


@dataclass(frozen=True)
class Config:
    """The blur launches of wavelet_fix. block_size: consecutive elements of a row per program.

    The last level takes up to four times as many per step, and whole rows per program.
    """

    block_size: int
    num_warps: int


@register
@dataclass(slots=True, eq=False)
class WaveletFix(ColorFix):
    """One color fix; fields and mathematics as in the module's docstring."""

    name = "wavelet_fix"
    config = Config
    tuned_by = ("x", "dtype")

    x: Tensor
    style: Tensor
    factor: int
    dtype: torch.dtype | None = None

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        x, style, factor = self.x, self.style, self.factor
        check_rank("x", x, "N,C,H,W")
        check(factor >= 1, f"factor must be at least 1, found {factor}")
        check_shape("style", style, (*x.shape[:2], x.shape[2] // factor, x.shape[3] // factor))
        check_shape("x", x, (*style.shape[:2], style.shape[2] * factor, style.shape[3] * factor))
        self.check_dtype()

    def reference(self) -> tuple[Tensor, Tensor]:
        """Plain PyTorch, in float32 or wider."""
        u = self.x.to(compute_dtype(torch.promote_types(self.x.dtype, self.style.dtype)))
        finite = is_finite(u, (1, 3))
        u = u.clamp(0, 1)
        low = ResizeBicubic(in_unit_range(self.style, u.dtype), self.factor, pillow=True).reference().clamp(0, 1) - u
        # Made on the device: a copy from the host cannot be captured in a CUDA graph.
        taps = 0.5 - 0.25 * torch.arange(-1, 2, dtype=u.dtype, device=u.device).abs()
        for level in range(LEVELS):
            low = _blur(low, taps, 2**level)
        return self.as_image((u + low).clamp(0, 1)), finite

    def cost(self) -> Cost:
        """FLOPs: 16 of the enlargement, 5 levels of 2 x 3 taps, difference and sum; bytes of every tensor once."""
        return self.cost_of(self.x.numel() * (16 + LEVELS * 12 + 2))

    def heuristic(self, gpu: Gpu) -> Config:
        """Part of a row: neighboring programs read its neighbors from the cache."""
        return Config(row_block(self.x, 512), 4)

    def plan(self, config: Config) -> Plan:
        """One launch for the band to blur, then one per level; x and style are read with the strides that they have."""
        x = self.x
        n, c, h, w = x.shape
        out, finite = self.empty()
        bands = [empty_nhwc(x, tuple(x.shape), torch.float32) for _ in range(2)]
        mul = 1 / 255 if self.style.dtype == torch.uint8 else 1.0
        enlarge = ResizeBicubic(self.style, self.factor, mul, pillow=True)
        launches = [enlarge.launch(enlarge.default_config(), bands[0], base=x)]
        for level in range(LEVELS):
            last = level == LEVELS - 1
            arguments = {
                "low": bands[level % 2],
                "x": x if last else None,
                "out": out if last else bands[1 - level % 2],
                "finite": finite if last else None,
                "height": h,
                "width": w,
                "channels": c,
                **strides_of(x),
                "DILATION": 2**level,
                "DENSE": is_dense(x, 1),
                # The result is narrower than the bands: as many bytes per thread.
                "BLOCK_SIZE": row_block(x, 4 * config.block_size) if last else config.block_size,
            }
            grid = (h * (1 if last else cdiv(w * c, config.block_size)), n)
            launches.append(Launch(kernels.blur, grid, arguments, config.num_warps, 1))
        return Plan((out, finite), tuple(launches))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """More and fewer elements per program."""
        for most, num_warps in itertools.product((128, 256, 512, 1024), (2, 4, 8)):
            yield Config(row_block(self.x, most), num_warps)


def _blur(x: Tensor, taps: Tensor, dilation: int) -> Tensor:
    """One separable blur of dilated [1,2,1]/4 per axis with replicate padding."""
    c = x.shape[1]
    row = taps.view(1, 1, 1, 3).expand(c, 1, 1, 3)
    column = taps.view(1, 1, 3, 1).expand(c, 1, 3, 1)
    x = F.pad(x, (dilation,) * 4, mode="replicate")
    x = conv2d(x, row, groups=c, dilation=dilation)
    return conv2d(x, column, groups=c, dilation=dilation)
