"""Moments of the rows of a product, so that the LayerNorm behind it costs no launch: `<operator>_row_moments`.

    out         = operator(...)                                                                  [...,F]
    row_moments = for every row and block of 32 features their mean and their sum of squared
                  deviations from it                                            [...,2,ceil(F/32)], float32 or wider

With mean and rstd = 1 / sqrt(variance + eps) of a row, LayerNorm and a linear behind it are

    W (x - mean) rstd + b  =  rstd (W x - mean c) + b,        c the sums of the rows of W

so the product takes x as it lies in memory, and its epilogue the rest. c is summed over the weight as it is rounded;
the parts are merged by Chan's rule (Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American
Statistician 37, 1983), so that nothing cancels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.beside import register_beside
from tinysr_kernels.ops.checks import check, check_shape
from tinysr_kernels.ops.norm.kernels import row_moments as row_moments_kernel
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Operator

PART = 32
"""Features that share a mean and squared deviations: a divisor of every tile's width, 96 and 192 included."""


def shape(rows: tuple[int, ...], features: int) -> tuple[int, ...]:
    """The shape of the moments of rows [...] of so many features."""
    return (*rows, 2, cdiv(features, PART))


def of(out: Tensor) -> Tensor:
    """[...,F] -> [...,2,ceil(F/32)] in float32 or wider."""
    features = out.shape[-1]
    whole = F.pad(out.to(compute_dtype(out.dtype)), (0, -features % PART)).unflatten(-1, (-1, PART))
    inside = F.pad(whole.new_ones(features), (0, -features % PART)).view(-1, PART)
    mean = whole.sum(-1) / inside.sum(-1)
    squares = ((whole - mean[..., None]) * inside).square().sum(-1)
    return torch.stack([mean, squares], -2)


def merged(row_moments: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """[...,2,ceil(F/32)] -> mean and biased variance of each row, [...,1] both, in float32 or wider."""
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
    check_shape("row_moments", row_moments, shape(tuple(x.shape[:-1]), x.shape[-1]))
    check_shape("weight_sums", weight_sums, (outputs,))


def with_row_moments(plan: Plan) -> Plan:
    """The plan of a product, with the moments of its rows as a second result.

    Where its last launch leaves no `out_moments` (a library's kernel), one more takes them.
    """
    found = plan.launches[-1].arguments.get("out_moments")
    if found is None:
        launch = take(plan.result)
        found, plan = launch.arguments["out_moments"], Plan(plan.result, (*plan.launches, launch))
    return Plan((plan.result, found), plan.launches)


def scratch(out: Tensor) -> Tensor:
    """Room for the moments of the rows of a result [...,F]."""
    return out.new_empty(shape(tuple(out.shape[:-1]), out.shape[-1]), dtype=torch.float32)


def take(out: Tensor) -> Launch:
    """The moments of the rows of a result [...,F] in memory."""
    features = out.shape[-1]
    number = out.numel() // features
    rows, columns = 16, next_power_of_2(features, least=PART, most=128)
    arguments = {
        "out": out,
        "out_moments": scratch(out),
        "rows": number,
        "features": features,
        "ROWS": rows,
        "COLUMNS": columns,
        "PART": PART,
    }
    grid = (cdiv(number, rows), cdiv(features, columns))
    return Launch(row_moments_kernel.take, grid, arguments, 4, 1)


def register_with_row_moments(
    operator: Operator, schema: str, operator_fake: Callable[..., Tensor], fitted: Callable[[Any], Any]
) -> Operator:
    """Register `<name>_row_moments(...) -> (out, row_moments)` beside an operator of this schema.

    The operator's kernels take `moments=True` in their plan. fitted: makes of its heuristic's configuration one whose
    tiles are whole parts wide.
    """
    own = operator.kernels
    assert own is not None

    @functools.wraps(own.heuristic)
    def heuristic(*args: Any, **kwargs: Any) -> Any:
        return fitted(own.heuristic(*args, **kwargs))

    @functools.wraps(own.space)
    def space(*args: Any, **kwargs: Any) -> Any:
        return (fitted(config) for config in own.space(*args, **kwargs))

    @functools.wraps(own.plan)
    def plan(config: Any, **arguments: Any) -> Plan:
        return with_row_moments(own.plan(config, **arguments, moments=True))

    def empty(out: Tensor) -> Tensor:
        return out.new_empty(shape(tuple(out.shape[:-1]), out.shape[-1]), dtype=compute_dtype(out.dtype))

    modules = (*own.modules, row_moments_kernel.__name__, __name__)
    kernels = dataclasses.replace(own, heuristic=heuristic, space=space, plan=plan, modules=modules)
    return register_beside(operator, schema, "row_moments", operator_fake, of, empty, kernels)
