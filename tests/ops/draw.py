"""Random tensors for operators' arguments, reproducible from a name."""

from __future__ import annotations

import math
import zlib

import torch
from torch import Tensor


class Draw:
    """Random float64 tensors from one seed."""

    def __init__(self, seed: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed values, the way biases and tables are."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale

    def weight(self, *shape: int) -> Tensor:
        """A weight [O, ...] scaled so that a sum over its inputs keeps their magnitude."""
        return self.normal(*shape) / math.prod(shape[1:]) ** 0.5

    def image(self, n: int, c: int, h: int, w: int, offset: float = 0.5) -> Tensor:
        """[N,C,H,W] with an offset per channel and, in one channel of sixteen, values 20 times as large."""
        scale = self.normal(c).abs() + 0.5
        scale[torch.randperm(c, generator=self.generator)[: max(1, c // 16)]] *= 20
        x = self.normal(n, c, h, w) * scale[:, None, None]
        return x + (self.normal(c) * offset * scale)[:, None, None]

    def tokens(self, *shape: int, offset: float = 0.5) -> Tensor:
        """[...,D] with outlier features, as `image`."""
        return self.image(math.prod(shape[:-1]), shape[-1], 1, 1, offset).reshape(shape)

    def unit(self, *shape: int) -> Tensor:
        """Uniform values in [0,1], the way images are."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)
