"""quantize_rows and layer_norm_quantize: activations in e4m3 with a scale for each row, for linear_fp8.

    scale = max|v| / 448                                   over the last dimension
    q     = v / scale                                      rounded to the nearest e4m3, ties to even

v is x itself, or (x - mean) / sqrt(variance + eps), which is layer_norm before any rounding. Nothing saturates: the
largest element of a row becomes 448, the largest e4m3. Infinity and NaN in a row make NaN, so that an overflow further
up shows. Layouts: x [...,D], q the same in float8_e4m3fn, scale [...,1] in float32 or wider; both contiguous.
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
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check
from tinysr_kernels.ops.layout import contiguous_as, nbytes
from tinysr_kernels.ops.linear.kernels import quantize as quantize_kernel
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST = 1e-24
"""Rows whose largest element is below it are taken as if it were this: zeros need a scale too."""
CAPABILITY = (8, 9)
"""The compute capability from which on GPUs convert to e4m3 and multiply it."""

SCHEMA = "quantize_rows(Tensor x) -> (Tensor, Tensor)"
NORM_SCHEMA = "layer_norm_quantize(Tensor x, float eps) -> (Tensor, Tensor)"


def quantized(v: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """v [...,D] of a wide dtype as (q [...,D] in e4m3, scale [...,groups] in v's dtype), D/groups elements a scale."""
    parts = v.unflatten(-1, (groups, -1))
    top = parts.abs().amax(-1, keepdim=True).clamp(min=SMALLEST)
    # A number divided by a tensor would be its reciprocal multiplied, with two roundings.
    q = (parts * (torch.full_like(top, LARGEST) / top)).clamp(-LARGEST, LARGEST)
    return contiguous_as(q.flatten(-2), E4M3), contiguous_as((top / LARGEST)[..., 0], v.dtype)


def dequantized(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values [...,D] that (q, scale) stand for, in a wide dtype."""
    return (q.to(dtype).unflatten(-1, (scale.shape[-1], -1)) * scale.to(dtype)[..., None]).flatten(-2)


def _check(x: Tensor) -> None:
    check(x.dim() >= 1, f"x must be [...,D], found {list(x.shape)}")


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (q, scale) of x [...,D] of any floating dtype. ValueError for a tensor without dimensions."""
    _check(x)
    return quantized(contiguous_as(x, compute_dtype(x.dtype)))


def norm_reference(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Plain PyTorch: (q, scale) of x [...,D] normalised. ValueError for a tensor without dimensions."""
    _check(x)
    return quantized(F.layer_norm(contiguous_as(x, compute_dtype(x.dtype)), x.shape[-1:], eps=eps))


def fake(x: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised results of the true shapes, dtypes and strides; raises what the reference raises."""
    _check(x)
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty((*x.shape[:-1], 1), dtype=compute_dtype(x.dtype))


def norm_fake(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `fake`."""
    return fake(x)


def cost(x: Tensor) -> Cost:
    """FLOPs: 2 per element, for the largest and the quotient; bytes: x read once, q and scale written once."""
    rows = x.numel() // x.shape[-1]
    return Cost(2 * x.numel(), nbytes(x) + x.numel() + rows * compute_dtype(x.dtype).itemsize)


def norm_cost(x: Tensor, eps: float) -> Cost:
    """FLOPs: 7 per element, 5 of them layer_norm's; bytes as without the norm."""
    return Cost(7 * x.numel(), cost(x).bytes)


@dataclass(frozen=True)
class Config:
    """A launch of either: rows a program; every row is held whole."""

    rows: int
    warps: int


def bucket(x: Tensor, **_: Any) -> str:
    """Calls that share a configuration: dtype, width, rows up to a power of two."""
    return f"{str(x.dtype).removeprefix('torch.')} {x.shape[-1]} {next_power_of_2(x.numel() // x.shape[-1], least=1)}"


def heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """2048 elements a program where rows are shorter; at most 32 elements a thread where they are longer."""
    columns = next_power_of_2(x.shape[-1])
    return Config(max(2048 // columns, 1), min(max(columns // 512, 4), 32))


def plan(config: Config, x: Tensor, eps: float | None = None) -> Plan:
    """The launch, without the norm where eps is None; raises what the reference raises.

    An input that is not dense is copied once.
    """
    q, scale = fake(x)
    width = x.shape[-1]
    rows = x.numel() // width
    arguments = {
        "x": contiguous_as(x, x.dtype),
        "out": q,
        "scale": scale,
        "eps": eps or 0.0,
        "smallest": SMALLEST,
        "rows": rows,
        "width": width,
        "ROWS": config.rows,
        "COLUMNS": next_power_of_2(width),
        "NORMALISE": eps is not None,
    }
    grid = (cdiv(rows, config.rows),)
    return Plan((q, scale), (Launch(quantize_kernel.quantize, grid, arguments, config.warps, 1),))


def space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """A few rows a program."""
    columns = next_power_of_2(x.shape[-1])
    for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32)):
        if 4 * 32 * warps <= rows * columns <= 32 * 32 * warps:
            yield Config(rows, warps)
    yield heuristic(gpu, x)


KERNELS = Implementation(Config, bucket, heuristic, plan, space, (quantize_kernel.__name__,), capability=CAPABILITY)

quantize_rows = register(SCHEMA, reference, fake, cost, KERNELS)
layer_norm_quantize = register(NORM_SCHEMA, norm_reference, norm_fake, norm_cost, KERNELS)
