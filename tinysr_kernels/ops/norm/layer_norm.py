"""layer_norm: LayerNorm over the last dimension without an affine part (that is folded into the linear that follows).

    out = (x - mean) / sqrt(variance + eps)            biased variance over the last dimension

Layouts: x [...,D] of one dimension or more, out of the same shape, contiguous.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, nbytes
from tinysr_kernels.ops.norm.kernels import layer_norm as kernels
from tinysr_kernels.ops.reference_math import compute_dtype


@dataclass(frozen=True)
class Config:
    """A launch of layer_norm. block_m: rows per program; block_n: columns per step, all of them if block_n >= D."""

    block_m: int
    block_n: int
    num_warps: int


@register
@dataclass(slots=True, eq=False)
class LayerNorm(Operator):
    """One LayerNorm; fields and mathematics as in the module's docstring."""

    name = "layer_norm"
    config = Config
    tuned_by = ("x",)

    x: Tensor
    eps: float

    def check(self) -> None:
        """ValueError for a tensor without dimensions."""
        check(self.x.dim() >= 1, f"x must be [...,D], found {list(self.x.shape)}")

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider; any floating dtype."""
        x = contiguous_as(self.x, compute_dtype(self.x.dtype))
        return contiguous_as(F.layer_norm(x, x.shape[-1:], eps=self.eps), self.x.dtype)

    def library(self) -> Tensor:
        """PyTorch's layer_norm in x's dtype, whose statistics are float32."""
        return contiguous_as(F.layer_norm(contiguous_as(self.x), self.x.shape[-1:], eps=self.eps))

    def empty(self) -> Tensor:
        """[...,D], contiguous, of x's dtype."""
        return torch.empty_like(self.x, memory_format=torch.contiguous_format)

    def cost(self) -> Cost:
        """FLOPs: 5 per element; bytes: x read once, the result written once."""
        return Cost(5 * self.x.numel(), nbytes(self.x) + self.x.numel() * self.x.element_size())

    def bucket(self) -> str:
        """dtype, D, rows up to a power of two."""
        width = self.x.shape[-1]
        return f"{dtype_name(self.x)} {width} {next_power_of_2(self.x.numel() // width, least=1)}"

    def heuristic(self, gpu: Gpu) -> Config:
        """Whole rows of up to 4096; 2048 elements per program, for any number of rows."""
        block_n = next_power_of_2(self.x.shape[-1], most=4096)
        return Config(max(2048 // block_n, 1), block_n, 4 if block_n <= 2048 else 8)

    def plan(self, config: Config) -> Plan:
        """One launch."""
        width = self.x.shape[-1]
        rows = self.x.numel() // width
        out = self.empty()
        arguments = {
            "x": contiguous_as(self.x),
            "out": out,
            "eps": self.eps,
            "rows": rows,
            "width": width,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "WHOLE_ROW": config.block_n >= width,
        }
        return Plan(out, (Launch(kernels.normalize, (cdiv(rows, config.block_m),), arguments, config.num_warps, 1),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """Whole rows of up to 4096, one to eight per program."""
        block_n = next_power_of_2(self.x.shape[-1], most=4096)
        for block_m, num_warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
            if block_m * block_n <= 8192:
                yield Config(block_m, block_n, num_warps)
