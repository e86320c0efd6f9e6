"""layer_norm: LayerNorm over the last dimension without an affine part (it is folded into the next linear).

    out = (x - mean) / sqrt(variance + eps)            biased variance over the last dimension

Layouts: x [...,D] of one dimension or more, out of the same shape, contiguous.
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
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check
from tinysr_kernels.ops.layout import contiguous_as, nbytes
from tinysr_kernels.ops.norm.kernels import layer_norm as layer_norm_kernel
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

SCHEMA = "layer_norm(Tensor x, float eps) -> Tensor"


def _check(x: Tensor) -> None:
    check(x.dim() >= 1, f"x must be [...,D], found {list(x.shape)}")


def reference(x: Tensor, eps: float) -> Tensor:
    """Plain PyTorch, in float32 or wider; contiguous result of x's shape and floating dtype.

    Raises ValueError for a tensor without dimensions.
    """
    _check(x)
    return contiguous_as(F.layer_norm(contiguous_as(x, compute_dtype(x.dtype)), x.shape[-1:], eps=eps), x.dtype)


def fake(x: Tensor, eps: float) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def cost(x: Tensor, eps: float) -> Cost:
    """FLOPs: 5 per element; bytes: x read once, the result written once."""
    return Cost(5 * x.numel(), nbytes(x) + x.numel() * x.element_size())


@dataclass(frozen=True)
class Config:
    """A launch of layer_norm: rows a program, columns a step (all of them, where that is enough)."""

    rows: int
    columns: int
    warps: int


def bucket(x: Tensor, **_: Any) -> str:
    """Calls that share a configuration: dtype, width, rows up to a power of two."""
    return f"{str(x.dtype).removeprefix('torch.')} {x.shape[-1]} {next_power_of_2(x.numel() // x.shape[-1], least=1)}"


def heuristic(gpu: Gpu, x: Tensor, **_: Any) -> Config:
    """Whole rows of up to 4096; 2048 elements a program, whatever the number of rows."""
    columns = next_power_of_2(x.shape[-1], most=4096)
    return Config(max(2048 // columns, 1), columns, 4 if columns <= 2048 else 8)


def plan(config: Config, x: Tensor, eps: float) -> Plan:
    """The launch; raises what the reference raises. An input that is not dense is copied once."""
    _check(x)
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = {
        "x": contiguous_as(x, x.dtype),
        "out": out,
        "eps": eps,
        "rows": rows,
        "width": width,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "WHOLE": config.columns >= width,
    }
    return Plan(out, (Launch(layer_norm_kernel.normalise, (cdiv(rows, config.rows),), arguments, config.warps, 1),))


def space(gpu: Gpu, x: Tensor, **_: Any) -> Iterator[Config]:
    """Whole rows, a few a program."""
    columns = next_power_of_2(x.shape[-1], most=4096)
    for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8)):
        if rows * columns <= 8192:
            yield Config(rows, columns, warps)


KERNELS = Implementation(
    Config, bucket, heuristic, plan, space, (layer_norm_kernel.__name__, device_functions.__name__)
)

layer_norm = register(SCHEMA, reference, fake, cost, KERNELS)
