"""group_norm: GroupNorm of one tensor or of the concatenation of two, with SiLU on request.

    v = concat(x, skip) over channels; per sample and group of C/groups channels: mean and biased variance
    out = act((v - mean) / sqrt(variance + eps) * weight + bias)          act = SiLU or nothing

Layouts: x [N,C1,H,W], skip [N,C2,H,W] or None, weight and bias [C1+C2], out [N,C1+C2,H,W] channels_last.
Groups may span the seam between x and skip and have any size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import (
    Cost,
    check,
    check_rank,
    check_shape,
    empty_nhwc,
    nhwc,
    plain,
    register,
    size,
    wide,
)

SCHEMA = (
    "group_norm(Tensor x, Tensor? skip, Tensor weight, Tensor bias, int groups, float eps, bool silu=True) -> Tensor"
)


def _out_shape(x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    n, c, h, w = x.shape
    if skip is not None:
        check_rank("skip", skip, "N,C,H,W")
        check_shape("skip", skip, (n, skip.shape[1], h, w))
        c += skip.shape[1]
    check_shape("weight", weight, (c,))
    check_shape("bias", bias, (c,))
    check(groups > 0 and c % groups == 0, f"groups must divide {c} channels, found {groups}")
    return n, c, h, w


def reference(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _out_shape(x, skip, weight, bias, groups)
    dtype = wide(x.dtype)
    # Contiguous planes, because torch takes the variance of channels_last ones as E[v^2] - mean^2: at a mean
    # of 50 standard deviations that errs by 4.5e-4 in float32, against 2.6e-6 this way.
    v = plain(x if skip is None else torch.cat([x, skip], 1), dtype)
    # torch.group_norm, unlike torch.nn.functional's, accepts a group of a single element (a 1x1 image).
    y = torch.group_norm(v, groups, weight.to(dtype), bias.to(dtype), eps)
    return nhwc((F.silu(y) if silu else y).to(x.dtype))


def fake(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return empty_nhwc(x, _out_shape(x, skip, weight, bias, groups))


def cost(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool = True
) -> Cost:
    """FLOPs: 3 per element for the statistics, 2 for the map, 4 for SiLU; bytes of each tensor once."""
    n, c, h, w = _out_shape(x, skip, weight, bias, groups)
    elements = n * c * h * w
    flops = elements * (9 if silu else 5)
    return Cost(flops, size(x, skip, weight, bias) + elements * x.element_size())


group_norm = register(SCHEMA, reference, fake, cost)
