"""layer_norm: LayerNorm over the last dimension without an affine part (it is folded into the next linear).

    out = (x - mean) / sqrt(variance + eps)            biased variance over the last dimension

Layouts: x [...,D] of one dimension or more, out of the same shape, contiguous.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import Cost, check, plain, register, size, wide

SCHEMA = "layer_norm(Tensor x, float eps) -> Tensor"


def _check(x: Tensor) -> None:
    check(x.dim() >= 1, f"x must be [...,D], found {list(x.shape)}")


def reference(x: Tensor, eps: float) -> Tensor:
    """Plain PyTorch, in float32 or wider; contiguous result of x's shape and floating dtype.

    Raises ValueError for a tensor without dimensions.
    """
    _check(x)
    return plain(F.layer_norm(plain(x, wide(x.dtype)), x.shape[-1:], eps=eps), x.dtype)


def fake(x: Tensor, eps: float) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check(x)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def cost(x: Tensor, eps: float) -> Cost:
    """FLOPs: 5 per element; bytes: x read once, the result written once."""
    return Cost(5 * x.numel(), size(x) + x.numel() * x.element_size())


layer_norm = register(SCHEMA, reference, fake, cost)
