"""conv3x3: a dense 3x3 convolution with its epilogue, and a 1x1 shortcut as an extra slice of its reduction.

    v[n,o,y,x] = sum_{c,i,j} weight[o,c,i,j] * x[n,c, s*y+i-1, s*x+j-1]
               + sum_k shortcut_weight[o,k] * concat(shortcut, skip)[n,k,y,x]
    out        = act(v + bias + residual)   or   act(v + bias) + residual

With norm_moments, the mean and variance of every channel of x [N,2,C], SiLU(GroupNorm(x)) takes the place of x
(`ops/norm/group_norm.py`); it is evaluated again for every tap but where the results are few, so mostly it is better done
before. Zero padding of one pixel, behind that norm.

Layouts: activations [N,C,H,W] and weight [O,C,3,3], both in channels_last memory.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu, gpu_of
from tinysr_kernels.launch.plan import Launch, Library, Plan, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_choice, check_epilogue, check_rank, check_shape, check_shortcut
from tinysr_kernels.ops.conv import conv_tiles
from tinysr_kernels.ops.conv.conv_norm import register_with_norm
from tinysr_kernels.ops.conv.conv_tiles import Config
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.conv.kernels import conv_few as conv_few_kernel
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.norm import group_norm
from tinysr_kernels.ops.norm.channel_moments import merged, register_with_moments
from tinysr_kernels.ops.norm.kernels import group_norm as group_norm_kernel
from tinysr_kernels.ops.norm.kernels import norm_silu_prologue as prologue_kernel
from tinysr_kernels.ops.reference_math import add_shortcut_1x1, compute_dtype, epilogue
from tinysr_kernels.ops.registry import Implementation, register

SCHEMA = (
    "conv3x3(Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, Tensor? shortcut=None, "
    "Tensor? skip=None, Tensor? shortcut_weight=None, int stride=1, "
    'str activation="none", bool activate_residual=True, '
    "Tensor? norm_moments=None, Tensor? norm_weight=None, Tensor? norm_bias=None, int norm_groups=1, "
    "float norm_eps=1e-5) -> Tensor"
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
    norm_moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_groups: int,
) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    check_rank("weight", weight, "O,C,3,3")
    check_shape("weight", weight, (weight.shape[0], x.shape[1], 3, 3))
    check_choice("stride", stride, (1, 2))
    out = _out_shape(x, weight, stride)
    check_epilogue(out, bias, residual, activation)
    check_shortcut(out, shortcut, skip, shortcut_weight)
    check_prologue(x, norm_moments, norm_weight, norm_bias, norm_groups)
    return out


def check_prologue(x: Tensor, moments: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int) -> None:
    """ValueError unless the tensors of a GroupNorm before a convolution come together and fit x [N,C,H,W]."""
    named = (("norm_moments", moments), ("norm_weight", weight), ("norm_bias", bias))
    given = [name for name, t in named if t is not None]
    check(len(given) in (0, 3), f"norm_moments, norm_weight and norm_bias must be given together, found only {given}")
    n, c = x.shape[:2]
    check_shape("norm_moments", moments, (n, 2, c))
    check_shape("norm_weight", weight, (c,))
    check_shape("norm_bias", bias, (c,))
    check(groups > 0 and c % groups == 0, f"norm_groups must divide {c} channels, found {groups}")


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
    norm_moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_groups: int = 1,
    norm_eps: float = 1e-5,
) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    norm = (norm_moments, norm_weight, norm_bias, norm_groups)
    _check(x, weight, bias, residual, shortcut, skip, shortcut_weight, stride, activation, *norm)
    u = nhwc(x.to(compute_dtype(x.dtype)))
    if norm_moments is not None and norm_weight is not None and norm_bias is not None:
        u = group_norm.reference(u, None, norm_weight, norm_bias, norm_groups, norm_eps, True, norm_moments)
    y = F.conv2d(u, nhwc(weight.to(u.dtype)), stride=stride, padding=1)
    y = add_shortcut_1x1(y, shortcut, skip, shortcut_weight)
    return epilogue(y, bias, residual, activation, activate_residual, x.dtype)


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
    norm_moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_groups: int = 1,
    norm_eps: float = 1e-5,
) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    norm = (norm_moments, norm_weight, norm_bias, norm_groups)
    out = _check(x, weight, bias, residual, shortcut, skip, shortcut_weight, stride, activation, *norm)
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
    norm_moments: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_groups: int = 1,
    norm_eps: float = 1e-5,
) -> Cost:
    """FLOPs of the convolution and the shortcut, 6 per element of x for a norm before; bytes of every tensor once."""
    n, o, h, w = _out_shape(x, weight, stride)
    k = 0 if shortcut_weight is None else shortcut_weight.shape[1]
    flops = 2 * n * h * w * o * (9 * x.shape[1] + k)
    if norm_moments is not None:
        flops += 6 * x.numel()
    moved = nbytes(x, weight, bias, residual, shortcut, skip, shortcut_weight, norm_moments, norm_weight, norm_bias)
    return Cost(flops, moved + n * o * h * w * x.element_size())


def bucket(
    x: Tensor, weight: Tensor, shortcut: Tensor | None, stride: int, norm_moments: Tensor | None, **_: Any
) -> str:
    """Calls that share a configuration, whatever the batch: dtype, channels, pixels of the result, stride, extras."""
    o, h, w = _out_shape(x, weight, stride)[1:]
    other = ("" if shortcut is None else "+1x1") + ("" if norm_moments is None else " normed")
    return f"{str(x.dtype).removeprefix('torch.')} {x.shape[1]}->{o} {next_power_of_2(h * w)} s{stride}{other}"


def _sizes(
    x: Tensor, weight: Tensor, shortcut: Tensor | None, skip: Tensor | None, stride: int
) -> tuple[int, int, int, list[int], int]:
    _, o, h, w = _out_shape(x, weight, stride)
    return h, w, o, [t.shape[1] for t in (x, shortcut, skip) if t is not None], x.element_size()


def heuristic(
    gpu: Gpu, x: Tensor, weight: Tensor, shortcut: Tensor | None, skip: Tensor | None, stride: int, **_: Any
) -> Config:
    """Our own kernel, whatever the batch."""
    sizes = _sizes(x, weight, shortcut, skip, stride)
    w, outputs = sizes[1:3]
    if _may_be_few(outputs, stride, shortcut):
        return conv_tiles.few(w, outputs, x.shape[1], x.element_size())
    return conv_tiles.heuristic(gpu, *sizes)


def _may_be_few(outputs: int, stride: int, shortcut: Tensor | None) -> bool:
    return outputs <= conv_tiles.MOST_FEW and stride == 1 and shortcut is None


def plan(
    config: Config,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shortcut: Tensor | None,
    skip: Tensor | None,
    shortcut_weight: Tensor | None,
    stride: int,
    activation: str,
    activate_residual: bool,
    norm_moments: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_groups: int,
    norm_eps: float,
    moments: bool = False,
) -> Plan:
    """The launches; raises what the reference raises. Inputs that are not dense in their layout are copied once.

    moments: the result's too (`ops/norm/channel_moments.py`).
    """
    norm = (norm_moments, norm_weight, norm_bias, norm_groups)
    shape = _check(x, weight, bias, residual, shortcut, skip, shortcut_weight, stride, activation, *norm)
    out = empty_nhwc(x, shape)
    # The product runs in the widest dtype of its operands; networks give them all the same.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (x, weight, shortcut, skip) if t is not None))
    tail = conv_tiles.Tail(
        None if bias is None else contiguous_as(bias, bias.dtype),
        None if residual is None else nhwc(residual),
        activation,
        activate_residual,
    )
    prologue = None
    if norm_moments is not None and norm_weight is not None and norm_bias is not None:
        moments_of_x, gain, shift = (contiguous_as(t, t.dtype) for t in (norm_moments, norm_weight, norm_bias))
        prologue = conv_tiles.Prologue(moments_of_x, gain, shift, norm_groups, norm_eps)
    launches: tuple[Launch | Library, ...]
    if config.form == "library":
        before: tuple[Launch | Library, ...] = ()
        if prologue is not None:
            # The library has no such thing: a launch of its own.
            affine = {"weight": prologue.weight, "bias": prologue.bias, "groups": norm_groups, "eps": norm_eps}
            given: dict[str, Any] = {
                "x": x,
                "skip": None,
                "moments": norm_moments,
                "skip_moments": None,
                "silu": True,
                **affine,
            }
            first = group_norm.plan(group_norm.heuristic(gpu_of(x), **given), **given)
            x, before = first.result, first.launches
        launches = (*before, *_library(x, weight, shortcut, skip, shortcut_weight, stride, tail, out))
    elif config.form == "few":
        check(_may_be_few(shape[1], stride, shortcut), f"few needs few results, found {shape[1]}, stride {stride}")
        launches = conv_tiles.few_launches(config, nhwc(x), nhwc(weight.to(dtype)), tail, out, prologue)
    else:
        arguments = {
            "x": nhwc(x),
            "weight": nhwc(weight.to(dtype)),
            "shortcut": None if shortcut is None else nhwc(shortcut),
            "skip": None if skip is None else nhwc(skip),
            "shortcut_weight": None if shortcut_weight is None else contiguous_as(shortcut_weight, dtype),
        }
        launches = conv_tiles.launches(
            config, arguments, tail, out, stride=stride, take_moments=moments, prologue=prologue
        )
    found = Plan(out, launches)
    return merged(found) if moments else found


def _library(
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor | None,
    skip: Tensor | None,
    shortcut_weight: Tensor | None,
    stride: int,
    tail: conv_tiles.Tail,
    out: Tensor,
) -> tuple[Launch | Library, ...]:
    """The library's convolution and products in the dtype of x, and our epilogue in place."""
    arguments = {"x": nhwc(x), "weight": nhwc(weight.to(x.dtype)), "stride": stride, "padding": 1, "out": out}
    steps: list[Launch | Library] = [Library(conv_tiles.convolve, arguments)]
    first = 0
    for t in (shortcut, skip):
        if t is not None and shortcut_weight is not None:
            columns = shortcut_weight[:, first : first + t.shape[1]].to(x.dtype)
            steps.append(Library(_add_1x1, {"x": nhwc(t.to(x.dtype)), "weight": columns, "out": out}))
            first += t.shape[1]
    return (*steps, *conv_tiles.epilogue(out, tail, out))


def _add_1x1(x: Tensor, weight: Tensor, out: Tensor) -> None:
    rows, sums = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (x, out))
    torch.addmm(sums, rows, weight.T, out=sums)


def space(
    gpu: Gpu,
    x: Tensor,
    weight: Tensor,
    shortcut: Tensor | None,
    skip: Tensor | None,
    stride: int,
    **_: Any,
) -> Iterator[Config]:
    """Tiles around the heuristic's, that for few results, and the library."""
    sizes = _sizes(x, weight, shortcut, skip, stride)
    w, outputs = sizes[1:3]
    if _may_be_few(outputs, stride, shortcut):
        usual = conv_tiles.few(w, outputs, x.shape[1], x.element_size())
        for pixels, warps in itertools.product((256, 512), (4, 8)):
            yield dataclasses.replace(usual, pixels=pixels, warps=warps)
    yield from conv_tiles.space(gpu, *sizes)


MODULES = (
    conv3x3_kernel,
    conv_few_kernel,
    prologue_kernel,
    conv_tiles,
    group_norm,
    group_norm_kernel,
    device_functions,
)
KERNELS = Implementation(Config, bucket, heuristic, plan, space, tuple(module.__name__ for module in MODULES))

conv3x3 = register(SCHEMA, reference, fake, cost, KERNELS)
conv3x3_moments = register_with_moments(conv3x3, SCHEMA, fake)
conv3x3_norm = register_with_norm(conv3x3, SCHEMA, fake)
