"""Statistics of the rows of a matmul's result, so that the LayerNorm after it needs no launch of its own.

    out         = operator(...)                                                    [...,F]
    row_moments = mean and sum of squared deviations of every 32 features of a row [...,2,ceil(F/32)], float32 or wider

`<operator>_row_moments` returns both. A LayerNorm and the linear W, b after it are, for a row x with its mean and
rstd = 1 / sqrt(variance + eps),

    W (x - mean) rstd + b  =  rstd (W x - mean c) + b,        c the sums of the rows of W

so that linear reads x as it is in memory, and its epilogue applies the norm. c is summed over the weight as rounded.
The parts of a row are merged by Chan's rule (Chan, Golub, LeVeque, "Algorithms for computing the sample variance",
The American Statistician 37, 1983), so that nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator
from tinysr_kernels.ops.checks import check, check_shape
from tinysr_kernels.ops.layout import nbytes
from tinysr_kernels.ops.norm.kernels import row_moments as row_moments_kernel
from tinysr_kernels.ops.reference_math import compute_dtype

PART = 32
"""Features per mean and squared deviations: a divisor of every tile's width, 96 and 192 included."""
BLOCKS = ("block_n", "block_n2")
"""The fields of a launch configuration that say how many features a tile has."""


def row_moments_shape(out_shape: tuple[int, ...]) -> tuple[int, ...]:
    """[...,2,ceil(F/32)], the shape of the statistics of a result [...,F]."""
    return (*out_shape[:-1], 2, cdiv(out_shape[-1], PART))


def row_moments_of(out: Tensor) -> Tensor:
    """[...,F] -> [...,2,ceil(F/32)] in float32 or wider."""
    features = out.shape[-1]
    parts = F.pad(out.to(compute_dtype(out.dtype)), (0, -features % PART)).unflatten(-1, (-1, PART))
    inside = F.pad(parts.new_ones(features), (0, -features % PART)).view(-1, PART)
    mean = parts.sum(-1) / inside.sum(-1)
    squares = ((parts - mean[..., None]) * inside).square().sum(-1)
    return torch.stack([mean, squares], -2)


def merge(row_moments: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """[...,2,ceil(F/32)] -> mean and biased variance of each row, both [...,1], in float32 or wider."""
    means, squares = row_moments.to(compute_dtype(row_moments.dtype)).unbind(-2)
    counts = torch.full_like(means[..., :1], PART).expand_as(means).clone()
    counts[..., -1] -= -features % PART
    mean = (means * counts).sum(-1, keepdim=True) / features
    variance = (squares + counts * (means - mean).square()).sum(-1, keepdim=True) / features
    return mean, variance


def check_row_moments(x: Tensor, outputs: int, row_moments: Tensor | None, weight_sums: Tensor | None) -> None:
    """ValueError unless row_moments fit x [...,K] and come together with weight_sums [outputs]."""
    together = (row_moments is None) == (weight_sums is None)
    check(together, "row_moments and weight_sums must be given together, found only one of them")
    check_shape("row_moments", row_moments, row_moments_shape(tuple(x.shape)))
    check_shape("weight_sums", weight_sums, (outputs,))


def out_moments(call: Operator, config: Any, out: Tensor) -> Tensor | None:
    """What a launch stores the statistics of its result [...,F] in: float32, None unless the call returns them.

    ValueError for a configuration whose tiles end inside a part.
    """
    if not isinstance(call, RowMoments):
        return None
    whole = all(getattr(config, name, 0) % PART == 0 for name in BLOCKS)
    check(whole, f"row moments need blocks of whole {PART} features")
    return _empty(out)


def whole_parts(config: Any) -> Any:
    """The configuration, with blocks of PART features where they have fewer."""
    return replace(config, **{name: max(getattr(config, name), PART) for name in BLOCKS if getattr(config, name, 0)})


def launch_row_moments(out: Tensor) -> Launch:
    """The launch that computes the statistics of a result [...,F] in memory."""
    features = out.shape[-1]
    rows = out.numel() // features
    block_m, block_n = 16, next_power_of_2(features, least=PART, most=128)
    arguments = {
        "out": out,
        "out_moments": _empty(out),
        "M": rows,
        "N": features,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "PART": PART,
    }
    grid = (cdiv(rows, block_m), cdiv(features, block_n))
    return Launch(row_moments_kernel.row_moments, grid, arguments, 4, 1)


def _empty(out: Tensor) -> Tensor:
    return out.new_empty(row_moments_shape(tuple(out.shape)), dtype=torch.float32)


class RowMoments(Operator):
    """Mixin for a matmul: it also returns the statistics of its result's rows. Goes before the matmul among the bases.

    The matmul's plan stores them where `out_moments` gives it memory. Where its last launch does not, as with a
    library's kernel, one more launch computes them.
    """

    __slots__ = ()
    returns = "(Tensor, Tensor)"

    def reference(self) -> Any:
        """The matmul's reference, and `row_moments_of` its result."""
        out = super().reference()
        return out, row_moments_of(out)

    def library(self) -> Any:
        """The matmul by the library, and `row_moments_of` its result; networks do not ask for them then."""
        out = super().library()
        return out, row_moments_of(out)

    def empty(self) -> Any:
        """The matmul's result, and [...,2,ceil(F/32)] in float32 or wider."""
        out: Tensor = super().empty()
        return out, out.new_empty(row_moments_shape(tuple(out.shape)), dtype=compute_dtype(out.dtype))

    def cost(self) -> Cost:
        """The matmul's, 3 FLOPs per element of the result, and the bytes of the statistics."""
        least, (out, moments) = super().cost(), self.empty()
        return Cost(least.flops + 3 * out.numel(), least.bytes + nbytes(moments))

    def heuristic(self, gpu: Gpu) -> Any:
        """The matmul's, with tiles of whole parts."""
        return whole_parts(super().heuristic(gpu))

    def space(self, gpu: Gpu) -> Iterator[Any]:
        """The matmul's, with tiles of whole parts."""
        return map(whole_parts, super().space(gpu))

    def plan(self, config: Any) -> Plan:
        """The matmul's launches, and one for the statistics where they do not store them."""
        plan = super().plan(config)
        moments = plan.launches[-1].arguments.get("out_moments")
        if moments is not None:
            return Plan((plan.result, moments), plan.launches)
        launch = launch_row_moments(plan.result)
        return Plan((plan.result, launch.arguments["out_moments"]), (*plan.launches, launch))
