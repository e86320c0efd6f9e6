"""sepconv: a depthwise 3x3 and a pointwise 1x1 convolution in one operator, the depthwise result not stored.

    d[n,c,y,x] = sum_{i,j} depthwise[c,i,j] * u[n,c, s*y+i-1, s*x+j-1]     u = x, or x enlarged nearest x2
    v[n,o,y,x] = sum_c pointwise[o,c] * d[n,c,y,x]
               + sum_k shortcut_weight[o,k] * concat(shortcut, skip)[n,k,y,x]
    out        = act(v + bias + residual)   or   act(v + bias) + residual

Zero padding of one pixel (of u). Layouts: activations [N,C,H,W] in channels_last memory, depthwise [C,3,3],
pointwise [O,C]. The separable convolutions are those of TinySR's VAE (arXiv 2508.17434, section 3.2).
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
    plain,
    register,
    shortcut_1x1,
    size,
    wide,
)

SCHEMA = (
    "sepconv(Tensor x, Tensor depthwise, Tensor pointwise, Tensor? bias=None, Tensor? residual=None, "
    "Tensor? shortcut=None, Tensor? skip=None, Tensor? shortcut_weight=None, int stride=1, "
    'bool upsample=False, str activation="none", bool activate_residual=True) -> Tensor'
)


def _out_shape(x: Tensor, pointwise: Tensor, stride: int, upsample: bool) -> tuple[int, int, int, int]:
    n, _, h, w = x.shape
    if upsample:
        h, w = 2 * h, 2 * w
    return n, pointwise.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1


def _check(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shortcut: Tensor | None,
    skip: Tensor | None,
    shortcut_weight: Tensor | None,
    stride: int,
    upsample: bool,
    activation: str,
) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    c = x.shape[1]
    check_shape("depthwise", depthwise, (c, 3, 3))
    check_rank("pointwise", pointwise, "O,C")
    check_shape("pointwise", pointwise, (pointwise.shape[0], c))
    check_choice("stride", stride, (1, 2))
    out = _out_shape(x, pointwise, stride, upsample)
    check_epilogue(out, bias, residual, activation)
    check_shortcut(out, shortcut, skip, shortcut_weight)
    return out


def reference(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    activation: str = "none",
    activate_residual: bool = True,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check(
        x,
        depthwise,
        pointwise,
        bias,
        residual,
        shortcut,
        skip,
        shortcut_weight,
        stride,
        upsample,
        activation,
    )
    u = nhwc(x.to(wide(x.dtype)))
    if upsample:
        u = F.interpolate(u, scale_factor=2, mode="nearest")
    d = F.conv2d(u, plain(depthwise, u.dtype)[:, None], stride=stride, padding=1, groups=x.shape[1])
    y = F.conv2d(d, plain(pointwise, u.dtype)[:, :, None, None])
    y = shortcut_1x1(y, shortcut, skip, shortcut_weight)
    return finish(y, bias, residual, activation, activate_residual, x.dtype)


def fake(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    activation: str = "none",
    activate_residual: bool = True,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    out = _check(
        x,
        depthwise,
        pointwise,
        bias,
        residual,
        shortcut,
        skip,
        shortcut_weight,
        stride,
        upsample,
        activation,
    )
    return empty_nhwc(x, out)


def cost(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    activation: str = "none",
    activate_residual: bool = True,
) -> Cost:
    """FLOPs of the two convolutions and the shortcut; bytes of every tensor once."""
    n, o, h, w = _out_shape(x, pointwise, stride, upsample)
    k = 0 if shortcut_weight is None else shortcut_weight.shape[1]
    c = x.shape[1]
    flops = 2 * n * h * w * (9 * c + o * (c + k))
    moved = size(x, depthwise, pointwise, bias, residual, shortcut, skip, shortcut_weight)
    return Cost(flops, moved + n * o * h * w * x.element_size())


sepconv = register(SCHEMA, reference, fake, cost)
