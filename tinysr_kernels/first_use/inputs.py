"""Random inputs for operator calls on meta tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.ops import Operator

POSITIVE = ("scale", "variance", "rstd")
"""Substrings of the names of tensors with positive values."""
SPREAD = 64.0
"""Standard deviation of fp8 values; the largest e4m3 value, 448, is seven times that."""


def random_inputs(arguments: Mapping[str, Any], device: torch.device, seed: int) -> dict[str, Any]:
    """The arguments with random tensors in place of meta tensors: the same shapes, dtypes, strides and identities.

    Dtype and name of an argument determine its distribution, so a new operator needs no code here. Activations are
    N(0, 1), weights N(0, 1/fan-in), so that outputs are of order one in half precision; moments are means and
    variances; scales and variances are positive; uint8 is uniform; fp8 values spread over their range, and NAME_scale
    scales NAME back to the magnitude that it has in half precision.
    """
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, Tensor] = {}
    inputs: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if id(value) not in made:
                made[id(value)] = _random(name, value, arguments.get(name.removesuffix("_scale")), device, generator)
            value = made[id(value)]
        inputs[name] = value
    return inputs


def random_call(call: Operator, device: torch.device, seed: int) -> Operator:
    """The same call with random inputs (`random_inputs`) on the device."""
    return type(call)(**random_inputs(call.arguments, device, seed))


def _random(name: str, like: Tensor, scaled: Any, device: torch.device, generator: torch.Generator) -> Tensor:
    """scaled: the tensor that `like` is the scale of, else `like` itself."""
    extent = like.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
    if like.dtype.is_floating_point:
        values = torch.randn(extent, dtype=torch.float32, device=device, generator=generator)
        if any(part in name for part in POSITIVE):
            values.mul_(0.25).abs_().add_(0.5)
        if like.dtype.itemsize == 1:
            values.mul_(SPREAD)
        elif isinstance(scaled, Tensor) and scaled is not like and scaled.dtype.itemsize == 1:
            values.mul_(_deviation(name.removesuffix("_scale"), scaled) / SPREAD)
        else:
            values.mul_(_deviation(name, like))
    else:
        values = torch.randint(0, 2 if like.dtype == torch.bool else 256, (extent,), device=device, generator=generator)
    made = values.to(like.dtype).as_strided(like.shape, like.stride(), like.storage_offset())
    if name.endswith("moments"):  # means, and variances or squared deviations: [...,2,C], or else [...,2]
        made.select(-2 if like.shape[-2] == 2 else -1, 1).abs_().add_(0.1)
    return made


def _deviation(name: str, like: Tensor) -> float:
    """The standard deviation of a tensor's values, before fp8 scaling."""
    weight = like.dim() > 1 and any(part in name for part in ("weight", "wise", "phases"))
    return math.sqrt(like.shape[0] / like.numel()) if weight and "scale" not in name else 1.0
