"""clamp_image: no color fix.

    out = clamp(x, 0, 1)

Also returns flags [N,H] that are True where all of a row of x was finite. Layouts as in `ops/image/color.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan
from tinysr_kernels.ops.call import Cost, register
from tinysr_kernels.ops.checks import check_rank
from tinysr_kernels.ops.image.color import ColorFix, is_dense, is_finite, row_block, strides_of
from tinysr_kernels.ops.image.kernels import clamp_image as kernels
from tinysr_kernels.ops.reference_math import compute_dtype


@dataclass(frozen=True)
class Config:
    """A launch of clamp_image, one program per row. block_size: consecutive elements of the row per step."""

    block_size: int
    num_warps: int


@register
@dataclass(slots=True, eq=False)
class ClampImage(ColorFix):
    """One image clamped; fields and mathematics as in the module's docstring."""

    name = "clamp_image"
    config = Config
    tuned_by = ("x", "dtype")

    x: Tensor
    dtype: torch.dtype | None = None

    def check(self) -> None:
        """ValueError unless x has four dimensions and the dtype is floating or uint8."""
        check_rank("x", self.x, "N,C,H,W")
        self.check_dtype()

    def reference(self) -> tuple[Tensor, Tensor]:
        """Plain PyTorch, in float32 or wider."""
        u = self.x.to(compute_dtype(self.x.dtype))
        return self.as_image(u.clamp(0, 1)), is_finite(u, (1, 3))

    def cost(self) -> Cost:
        """No FLOPs; bytes of every tensor once."""
        return self.cost_of(0)

    def heuristic(self, gpu: Gpu) -> Config:
        """A whole row, or 16 elements per thread: wide stores."""
        return Config(row_block(self.x, 2048), 4)

    def plan(self, config: Config) -> Plan:
        """One launch, which reads x with the strides that it has."""
        out, finite = self.empty()
        n, c, h, w = self.x.shape
        arguments = {
            "x": self.x,
            "out": out,
            "finite": finite,
            "height": h,
            "width": w,
            "channels": c,
            **strides_of(self.x),
            "DENSE": is_dense(self.x, 1),
            "BLOCK_SIZE": config.block_size,
        }
        return Plan((out, finite), (Launch(kernels.clamp, (h, n), arguments, config.num_warps, 1),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """More and fewer elements per step."""
        for most, num_warps in itertools.product((512, 1024, 2048, 4096), (2, 4, 8)):
            yield Config(row_block(self.x, most), num_warps)
