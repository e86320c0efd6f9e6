"""conv3x3: a dense 3x3 convolution with its epilogue, and a 1x1 shortcut as an extra slice of its reduction.

    v[n,o,y,x] = sum_{c,i,j} weight[o,c,i,j] * x[n,c, s*y+i-1, s*x+j-1]
               + sum_k shortcut_weight[o,k] * concat(shortcut, skip)[n,k,y,x]
    out        = act(v + bias + residual)   or   act(v + bias) + residual

Zero padding of one pixel. Layouts: activations [N,C,H,W] and weight [O,C,3,3], both in channels_last memory.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import (
    Cost,
    check_choice,
    check_epilogue,
    check_rank,
    check_shape,
    check_shortcut,
    empty_nhwc,
    finish,
    nhwc,
    register,
    shortcut_1x1,
    size,
    wide,
)

SCHEMA = (
    "conv3x3(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? shortcut=None, "
    "Tensor? skip=None, Tensor? shortcut_weight=None, int stride=1, "
    'str activation="none", bool activate_residual=True) -> Tensor'
)


def _out_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    return n, weight.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shortcut: Tensor | None,
    skip: Tensor | None,
    shortcut_weight: Tensor | None,
    stride: int,
    activation: str,
) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    check_rank("weight", weight, "O,C,3,3")
    check_shape("weight", weight, (weight.shape[0], x.shape[1], 3, 3))
    check_choice("stride", stride, (1, 2))
    out = _out_shape(x, weight, stride)
    check_epilogue(out, bias, residual, activation)
    check_shortcut(out, shortcut, skip, shortcut_weight)
    return out


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    activation: str = "none",
    activate_residual: bool = True,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check(x, weight, bias, residual, shortcut, skip, shortcut_weight, stride, activation)
    u = nhwc(x.to(wide(x.dtype)))
    y = F.conv2d(u, nhwc(weight.to(u.dtype)), stride=stride, padding=1)
    y = shortcut_1x1(y, shortcut, skip, shortcut_weight)
    return finish(y, bias, residual, activation, activate_residual, x.dtype)


def fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    activation: str = "none",
    activate_residual: bool = True,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    out = _check(x, weight, bias, residual, shortcut, skip, shortcut_weight, stride, activation)
    return empty_nhwc(x, out)


def cost(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    activation: str = "none",
    activate_residual: bool = True,
) -> Cost:
    """FLOPs of the convolution and the shortcut; bytes of every tensor once."""
    n, o, h, w = _out_shape(x, weight, stride)
    k = 0 if shortcut_weight is None else shortcut_weight.shape[1]
    flops = 2 * n * h * w * o * (9 * x.shape[1] + k)
    moved = size(x, weight, bias, residual, shortcut, skip, shortcut_weight)
    return Cost(flops, moved + n * o * h * w * x.element_size())


conv3x3 = register(SCHEMA, reference, fake, cost)
