"""quantize_rows and layer_norm_quantize: activations in e4m3 with one scale per row, for linear_fp8.

    scale = max|v| / 448                                   over the last dimension
    q     = v / scale                                      rounded to the nearest e4m3, ties to even

v is x itself, or (x - mean) / sqrt(variance + eps), which is layer_norm before any rounding. Nothing saturates: the
largest element of a row becomes 448, the largest e4m3. Infinity and NaN in a row become NaN, so that an earlier
overflow shows. Layouts: x [...,D], q the same in float8_e4m3fn, scale [...,1] in float32 or wider; both contiguous.
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
from tinysr_kernels.ops.linear.kernels import quantize as quantize_kernel
from tinysr_kernels.ops.reference_math import compute_dtype

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-24
"""The largest element of a row counts as at least this: rows of zeros need a scale too."""
CAPABILITY = (8, 9)
"""The lowest compute capability of GPUs that convert to e4m3 and multiply it."""


def quantized(v: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """v [...,D] of a wide dtype as (q [...,D] in e4m3, scale [...,groups] in v's dtype)."""
    parts = v.unflatten(-1, (groups, -1))
    top = parts.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    # A number divided by a tensor would be its reciprocal multiplied, with two roundings.
    q = (parts * (torch.full_like(top, LARGEST) / top)).clamp(-LARGEST, LARGEST)
    return contiguous_as(q.flatten(-2), E4M3), contiguous_as((top / LARGEST)[..., 0], v.dtype)


def dequantized(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [...,D] that (q, scale) stand for, in a wide dtype."""
    return (q.to(dtype).unflatten(-1, (scale.shape[-1], -1)) * scale.to(dtype)[..., None]).flatten(-2)


@dataclass(frozen=True)
class Config:
    """A launch of either operator: rows per program; every row is held whole."""

    block_m: int
    num_warps: int


@register
@dataclass(slots=True, eq=False)
class QuantizeRows(Operator):
    """The quantization of x; fields and mathematics as in the module's docstring."""

    name = "quantize_rows"
    config = Config
    tuned_by = ("x",)
    returns = "(Tensor, Tensor)"
    capability = CAPABILITY

    x: Tensor

    def check(self) -> None:
        """ValueError for a tensor without dimensions."""
        check(self.x.dim() >= 1, f"x must be [...,D], found {list(self.x.shape)}")

    def reference(self) -> tuple[Tensor, Tensor]:
        """Plain PyTorch, in float32 or wider: (q, scale) of x of any floating dtype."""
        return quantized(contiguous_as(self.x, compute_dtype(self.x.dtype)))

    def empty(self) -> tuple[Tensor, Tensor]:
        """(q [...,D] in e4m3, scale [...,1] in float32 or wider), contiguous."""
        x = self.x
        return x.new_empty(x.shape, dtype=E4M3), x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x.dtype))

    def cost(self) -> Cost:
        """FLOPs: 2 per element, for the largest and the quotient; bytes: x read once, q and scale written once."""
        return Cost(2 * self.x.numel(), nbytes(self.x, *self.empty()))

    def bucket(self) -> str:
        """dtype, width, rows up to a power of two."""
        width = self.x.shape[-1]
        return f"{dtype_name(self.x)} {width} {next_power_of_2(self.x.numel() // width, least=1)}"

    def heuristic(self, gpu: Gpu) -> Config:
        """2048 elements per program where rows are shorter; at most 32 elements per thread where they are longer."""
        block_n = next_power_of_2(self.x.shape[-1])
        return Config(max(2048 // block_n, 1), min(max(block_n // 512, 4), 32))

    def plan(self, config: Config) -> Plan:
        """One launch."""
        return _plan(config, self, eps=None)

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """A few rows per program."""
        block_n = next_power_of_2(self.x.shape[-1])
        for block_m, num_warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32)):
            if 4 * 32 * num_warps <= block_m * block_n <= 32 * 32 * num_warps:
                yield Config(block_m, num_warps)
        yield self.heuristic(gpu)


@register
@dataclass(slots=True, eq=False)
class LayerNormQuantize(QuantizeRows):
    """The quantization of x normalized; fields and mathematics as in the module's docstring."""

    name = "layer_norm_quantize"

    eps: float

    def reference(self) -> tuple[Tensor, Tensor]:
        """Plain PyTorch, in float32 or wider: (q, scale) of x of any floating dtype, normalized."""
        x = contiguous_as(self.x, compute_dtype(self.x.dtype))
        return quantized(F.layer_norm(x, x.shape[-1:], eps=self.eps))

    def cost(self) -> Cost:
        """FLOPs: 7 per element, 5 of them layer_norm's; bytes: x read once, q and scale written once."""
        return Cost(7 * self.x.numel(), nbytes(self.x, *self.empty()))

    def plan(self, config: Config) -> Plan:
        """One launch."""
        return _plan(config, self, self.eps)


def _plan(config: Config, call: QuantizeRows, eps: float | None) -> Plan:
    """The launch of a call; eps: that of the norm, None without one."""
    q, scale = call.empty()
    width = call.x.shape[-1]
    rows = call.x.numel() // width
    arguments = {
        "x": contiguous_as(call.x),
        "out": q,
        "scale": scale,
        "eps": eps or 0.0,
        "smallest": SMALLEST,
        "M": rows,
        "N": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": next_power_of_2(width),
        "NORMALIZE": eps is not None,
    }
    grid = (cdiv(rows, config.block_m),)
    return Plan((q, scale), (Launch(quantize_kernel.quantize, grid, arguments, config.num_warps, 1),))
