"""adain_fix: mean and standard deviation of every channel as in style, the original image.

    out = clamp((x - mean_x) * gain + mean_style, 0, 1),     gain = dev_style / max(dev_x, least)

with dev = sqrt(variance + eps), per sample and channel over all pixels. The variance is unbiased, that of a single
pixel is 0. With clamp=True, x is clamped to [0,1] before anything else.

Also returns flags [N] that are True where all of a sample of x was finite and its statistics did not overflow.
Layouts as in `ops/image/color.py`: x [N,C,H,W], style [N,C,h,w].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, register
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.image.color import ColorFix, in_unit_range, is_dense, is_finite, strides_of
from tinysr_kernels.ops.image.kernels import adain as kernels
from tinysr_kernels.ops.layout import contiguous_as
from tinysr_kernels.ops.reference_math import compute_dtype

MAX_PARTS = 256
"""Largest number of parts whose statistics are merged: every program of the second launch merges them all."""


@dataclass(frozen=True)
class Config:
    """The launches of adain_fix. block_size and num_warps: elements and warps per program of the second launch.

    part_block_size: elements per step of a program of the first launch, which computes the statistics of one part.
    """

    block_size: int
    num_warps: int
    part_block_size: int


@register
@dataclass(slots=True, eq=False)
class AdaINFix(ColorFix):
    """One color fix; fields and mathematics as in the module's docstring."""

    name = "adain_fix"
    config = Config
    tuned_by = ("x", "dtype")

    x: Tensor
    style: Tensor
    eps: float
    least: float
    clamp: bool = False
    dtype: torch.dtype | None = None

    @property
    def flags_shape(self) -> tuple[int, ...]:
        """[N]: one flag per sample."""
        return (self.x.shape[0],)

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("x", self.x, "N,C,H,W")
        check_rank("style", self.style, "N,C,h,w")
        check_shape("style", self.style, (*self.x.shape[:2], *self.style.shape[2:]))
        positive = self.eps >= 0 and self.least >= 0 and max(self.eps, self.least) > 0
        check(positive, f"eps or least must be positive, found {self.eps} and {self.least}")
        self.check_dtype()

    def reference(self) -> tuple[Tensor, Tensor]:
        """Plain PyTorch, in float32 or wider."""
        u = contiguous_as(self.x, compute_dtype(torch.promote_types(self.x.dtype, self.style.dtype)))
        finite = is_finite(u, (1, 2, 3))
        u = u.clamp(0, 1) if self.clamp else u
        mean, variance = _mean_and_variance(u)
        style_mean, style_variance = _mean_and_variance(contiguous_as(in_unit_range(self.style, u.dtype)))
        finite &= (variance < torch.inf).flatten(1).all(1)
        gain = (style_variance + self.eps).sqrt() / (variance + self.eps).sqrt().clamp(min=self.least)
        return self.as_image(((u - mean) * gain + style_mean).clamp(0, 1)), finite

    def cost(self) -> Cost:
        """FLOPs: 4 per element of both images for the statistics, 3 of x for the map; bytes of every tensor once."""
        return self.cost_of(4 * (self.x.numel() + self.style.numel()) + 3 * self.x.numel())

    def heuristic(self, gpu: Gpu) -> Config:
        """The same for any batch size, so that a sample's sums have the same order in any batch.

        16 elements per thread: wide stores.
        """
        elements = self.x[0].numel()
        part_block_size = next_power_of_2(cdiv(elements, MAX_PARTS), least=256, most=1024)
        return Config(next_power_of_2(elements, least=256, most=4096), 8, part_block_size)

    def plan(self, config: Config) -> Plan:
        """Two launches: the statistics of parts of both images; in every program, their merging and then the map.

        x and style are read with the strides that they have.
        """
        out, finite = self.empty()
        n, c = self.x.shape[:2]
        blocks = [cdiv(t[0].numel(), config.part_block_size) for t in (self.x, self.style)]
        x_parts, style_parts = (_parts(count, c) for count in blocks)
        max_parts = max(x_parts, style_parts)
        shared = {
            "scratch_moments": self.x.new_empty((n, 3, 2 * c, max_parts), dtype=torch.float32),
            "x": self.x,
            "max_parts": max_parts,
            "x_parts": x_parts,
            "style_parts": style_parts,
            "CHANNELS": c,
            "CLAMP": self.clamp,
        }
        measured = {
            **shared,
            "style": self.style,
            "x_blocks": blocks[0],
            "style_blocks": blocks[1],
            **_sizes_of(self.x, "x_"),
            **_sizes_of(self.style, "style_"),
            "X_DENSE": is_dense(self.x),
            "STYLE_DENSE": is_dense(self.style),
            "BLOCK_SIZE": config.part_block_size,
        }
        mapped = {
            **shared,
            "out": out,
            "finite": finite,
            "style_scale": 1 / 255 if self.style.dtype == torch.uint8 else 1.0,
            "eps": float(self.eps),
            "least": float(self.least),
            **_sizes_of(self.x),
            "DENSE": is_dense(self.x),
            "BLOCK_CHANNELS": next_power_of_2(2 * c, least=1),
            "BLOCK_PARTS": next_power_of_2(max_parts, least=1),
            "BLOCK_SIZE": config.block_size,
        }
        # Four elements per thread, two of a large block: with more, registers spill on some architectures.
        num_warps = max(config.part_block_size // (64 if config.part_block_size >= 1024 else 128), 1)
        grid = (cdiv(self.x[0].numel(), config.block_size), n)
        return Plan(
            (out, finite),
            (
                Launch(kernels.part_moments, (x_parts + style_parts, n), measured, num_warps, 1),
                Launch(kernels.adain, grid, mapped, config.num_warps, 1),
            ),
        )

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """More and fewer elements per program, of both launches."""
        sizes = itertools.product((1024, 2048, 4096), (256, 512, 1024, 2048), (4, 8))
        for block_size, part_block_size, num_warps in sizes:
            if block_size <= 512 * num_warps:
                yield Config(block_size, num_warps, part_block_size)


def _mean_and_variance(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of every channel, [N,C,1,1]."""
    flat = u.flatten(2)
    variance, mean = torch.var_mean(flat, 2, correction=min(1, flat.shape[2] - 1))
    return mean[:, :, None, None], variance[:, :, None, None]


def _parts(blocks: int, channels: int) -> int:
    """One part per block, but at most MAX_PARTS; parts of several blocks are a multiple of the channels in number."""
    return blocks if blocks <= MAX_PARTS else max(MAX_PARTS // channels, 1) * channels


def _sizes_of(image: Tensor, prefix: str = "") -> dict[str, int]:
    """Pixels, width and strides of an image as kernel arguments."""
    height, width = image.shape[2:]
    return {prefix + "pixels": height * width, prefix + "width": width, **strides_of(image, prefix)}
