"""sepconv: a depthwise 3x3 and a pointwise 1x1 convolution in one operator, the depthwise result not stored.

    u = x, or silu(GroupNorm(x)) with the channels' moments given, or either enlarged nearest x2
    d[n,c,y,x] = sum_{i,j} depthwise[c,i,j] * u[n,c, s*y+i-1, s*x+j-1]
    v[n,o,y,x] = sum_c pointwise[o,c] * d[n,c,y,x]
               + sum_k shortcut_weight[o,k] * concat(shortcut, skip)[n,k,y,x]
    out        = act(v + bias + residual)   or   act(v + bias) + residual

Zero padding of one pixel (of u, behind norm and SiLU). Layouts: activations [N,C,H,W] in channels_last memory,
depthwise [C,3,3] with the channels last in memory, pointwise [O,C], norm_moments [N,2,C] as `<convolution>_moments`
leaves them (`ops/norm/channel_moments.py`), norm_weight and norm_bias [C]. The norm stands here so that it can be measured: SiLU is
evaluated for every shift of a row, three times an element, where a launch of its own does so once. The separable
convolutions are those of TinySR's VAE (arXiv 2508.17434, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Implementation, Plan, power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.conv import sepconv_tiles
from tinysr_kernels.ops.conv.kernels import sepconv as sepconv_kernel
from tinysr_kernels.ops.conv.sepconv_tiles import Config, Norm
from tinysr_kernels.ops.norm import group_norm
from tinysr_kernels.ops.norm.channel_moments import merged, register_with_moments
from tinysr_kernels.ops.norm.kernels import norm_silu_prologue as prologue_kernel
from tinysr_kernels.ops.registry import (
    Cost,
    check,
    check_choice,
    check_epilogue,
    check_rank,
    check_shape,
    check_shortcut,
    empty_nhwc,
    finish,
    nhwc,
    plain,
    product,
    register,
    rows,
    shortcut_1x1,
    size,
    wide,
)

SCHEMA = (
    "sepconv(Tensor x, Tensor depthwise, Tensor pointwise, Tensor? bias=None, Tensor? residual=None, "
    "Tensor? shortcut=None, Tensor? skip=None, Tensor? shortcut_weight=None, int stride=1, "
    'bool upsample=False, str activation="none", bool activate_residual=True, Tensor? norm_moments=None, '
    "Tensor? norm_weight=None, Tensor? norm_bias=None, int norm_groups=0, float norm_eps=0.0) -> Tensor"
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


def _norm(
    x: Tensor, moments: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
) -> Norm | None:
    """The norm of x, checked, if there is one."""
    if moments is None or weight is None or bias is None:
        given = [f"norm_{k}" for k, v in (("moments", moments), ("weight", weight), ("bias", bias)) if v is not None]
        check(not given, f"norm_moments, norm_weight and norm_bias must be given together, found only {given}")
        return None
    n, c = x.shape[:2]
    check_shape("norm_moments", moments, (n, 2, c))
    check_shape("norm_weight", weight, (c,))
    check_shape("norm_bias", bias, (c,))
    check(groups > 0 and c % groups == 0, f"norm_groups must divide {c} channels, found {groups}")
    return Norm(moments, weight, bias, groups, eps)


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
    norm_moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_groups: int = 0,
    norm_eps: float = 0.0,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check(x, depthwise, pointwise, bias, residual, shortcut, skip, shortcut_weight, stride, upsample, activation)
    norm = _norm(x, norm_moments, norm_weight, norm_bias, norm_groups, norm_eps)
    u = nhwc(x.to(wide(x.dtype)))
    if norm is not None:
        given = (norm.weight, norm.bias, norm.groups, norm.eps)
        u = group_norm.reference(u, None, *given, silu=True, moments=norm.moments)
    if upsample:
        u = F.interpolate(u, scale_factor=2, mode="nearest")
    d = F.conv2d(u, plain(depthwise, u.dtype)[:, None], stride=stride, padding=1, groups=x.shape[1])
    y = product(rows(nhwc(d)), plain(pointwise, u.dtype))
    y = y.view(d.shape[0], *d.shape[2:], -1).permute(0, 3, 1, 2)
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
    norm_moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_groups: int = 0,
    norm_eps: float = 0.0,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    out = _check(x, depthwise, pointwise, bias, residual, shortcut, skip, shortcut_weight, stride, upsample, activation)
    _norm(x, norm_moments, norm_weight, norm_bias, norm_groups, norm_eps)
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
    norm_moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_groups: int = 0,
    norm_eps: float = 0.0,
) -> Cost:
    """FLOPs of the two convolutions, the shortcut and the norm (6 an element); bytes of every tensor once."""
    n, o, h, w = _out_shape(x, pointwise, stride, upsample)
    k = 0 if shortcut_weight is None else shortcut_weight.shape[1]
    c = x.shape[1]
    flops = 2 * n * h * w * (9 * c + o * (c + k)) + (0 if norm_moments is None else 6 * x.numel())
    moved = size(x, depthwise, pointwise, bias, residual, shortcut, skip, shortcut_weight)
    moved += size(norm_moments, norm_weight, norm_bias)
    return Cost(flops, moved + n * o * h * w * x.element_size())


def bucket(
    x: Tensor,
    pointwise: Tensor,
    shortcut: Tensor | None,
    stride: int,
    upsample: bool,
    norm_moments: Tensor | None,
    **_: Any,
) -> str:
    """Calls that share a configuration: dtype, channels, pixels of the result up to a power of two, variant."""
    n, o, h, w = _out_shape(x, pointwise, stride, upsample)
    variant = f"{'up' if upsample else f's{stride}'}{'' if shortcut is None else '+1x1'}"
    norm = "" if norm_moments is None else " norm"
    return f"{str(x.dtype).removeprefix('torch.')} {x.shape[1]}->{o} {power_of_2(n * h * w)} {variant}{norm}"


def heuristic(
    gpu: Gpu, x: Tensor, pointwise: Tensor, stride: int, upsample: bool, norm_moments: Tensor | None, **_: Any
) -> Config:
    """`sepconv_tiles.heuristic` for the shape of the result."""
    n, o, h, w = _out_shape(x, pointwise, stride, upsample)
    return sepconv_tiles.heuristic(gpu, n, x.shape[1], o, h, w, x.element_size(), norm_moments is not None)


def moments_heuristic(gpu: Gpu, **arguments: Any) -> Config:
    """The same for one sample, whatever the batch, so that a sample's moments are merged in the same order in any.

    The moments of a tile take registers besides: threads hold fewer values, of 128 channels in single precision half as
    many, and where these are 4 warps of up to 64 channels a quarter.
    """
    x: Tensor = arguments["x"]
    found = heuristic(gpu, **{**arguments, "x": x[:1]})
    if found.form == "march" and found.warps == 4 and found.channels <= 64:
        # With few outputs besides, 8 warps would spill a register on sm_80 in Triton 3.6.
        warps = 4 if x.element_size() == 2 and found.channels == 64 and found.outputs < 64 else 8
        return replace(found, warps=warps, pixels=max(found.pixels // 2, 16))
    if found.form == "march" and found.channels == 128 and x.element_size() == 4:
        return replace(found, warps=16)
    return found


def plan(
    config: Config,
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
    activate_residual: bool,
    norm_moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_groups: int,
    norm_eps: float,
    moments: bool = False,
) -> Plan:
    """The launch; raises what the reference raises. Inputs that are not dense in their layout are copied once.

    moments: the result's too, from one launch more (`ops/norm/channel_moments.py`).
    """
    shape = _check(
        x, depthwise, pointwise, bias, residual, shortcut, skip, shortcut_weight, stride, upsample, activation
    )
    norm = _norm(x, norm_moments, norm_weight, norm_bias, norm_groups, norm_eps)
    out = empty_nhwc(x, shape)
    launch = sepconv_tiles.launch(
        config,
        x,
        depthwise,
        pointwise,
        bias,
        residual,
        out,
        shortcut=shortcut,
        skip=skip,
        shortcut_weight=shortcut_weight,
        stride=stride,
        upsample=upsample,
        activation=activation,
        activate_residual=activate_residual,
        norm=norm,
        take_moments=moments,
    )
    return merged(Plan(out, (launch,))) if moments else Plan(out, (launch,))


def space(gpu: Gpu, x: Tensor, pointwise: Tensor, stride: int, upsample: bool, **_: Any) -> Iterator[Config]:
    """`sepconv_tiles.space` for the shape of the result."""
    out = _out_shape(x, pointwise, stride, upsample)
    return sepconv_tiles.space(x.shape[1], out[1], out[3])


KERNELS = Implementation(
    Config,
    bucket,
    heuristic,
    plan,
    space,
    (sepconv_tiles.__name__, sepconv_kernel.__name__, prologue_kernel.__name__, device_functions.__name__),
)

sepconv = register(SCHEMA, reference, fake, cost, KERNELS)
sepconv_moments = register_with_moments(sepconv, SCHEMA, fake, moments_heuristic)
