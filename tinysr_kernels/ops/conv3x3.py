"""conv3x3: a dense 3x3 convolution with its epilogue, and a 1x1 shortcut as an extra slice of its reduction.

    v[n,o,y,x] = sum_{c,i,j} weight[o,c,i,j] * x[n,c, s*y+i-1, s*x+j-1]
               + sum_k shortcut_weight[o,k] * concat(shortcut, skip)[n,k,y,x]
    out        = act(v + bias + residual)   or   act(v + bias) + residual

Zero padding of one pixel. Layouts: activations [N,C,H,W] and weight [O,C,3,3], both in channels_last memory.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Implementation, Launch, Library, Plan, power_of_2
from tinysr_kernels.ops import conv3x3_kernel, conv_tiles, tiles
from tinysr_kernels.ops.conv_norm import register_with_norm
from tinysr_kernels.ops.conv_tiles import Config
from tinysr_kernels.ops.moments import merged, register_with_moments
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


def bucket(x: Tensor, weight: Tensor, shortcut: Tensor | None, stride: int, **_: Any) -> str:
    """Calls that share a configuration, whatever the batch: dtype, channels, pixels of the result, stride, shortcut."""
    o, h, w = _out_shape(x, weight, stride)[1:]
    other = "" if shortcut is None else "+1x1"
    return f"{str(x.dtype).removeprefix('torch.')} {x.shape[1]}->{o} {power_of_2(h * w)} s{stride}{other}"


def _sizes(
    x: Tensor, weight: Tensor, shortcut: Tensor | None, skip: Tensor | None, stride: int
) -> tuple[int, int, int, list[int], int]:
    _, o, h, w = _out_shape(x, weight, stride)
    return h, w, o, [t.shape[1] for t in (x, shortcut, skip) if t is not None], x.element_size()


def heuristic(
    gpu: Gpu, x: Tensor, weight: Tensor, shortcut: Tensor | None, skip: Tensor | None, stride: int, **_: Any
) -> Config:
    """Our own kernel, whatever the batch."""
    return conv_tiles.heuristic(gpu, *_sizes(x, weight, shortcut, skip, stride))


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
    moments: bool = False,
) -> Plan:
    """The launches; raises what the reference raises. Inputs that are not dense in their layout are copied once.

    moments: the result's too (`ops/moments.py`).
    """
    shape = _check(x, weight, bias, residual, shortcut, skip, shortcut_weight, stride, activation)
    out = empty_nhwc(x, shape)
    # The product runs in the widest dtype of its operands; networks give them all the same.
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in (x, weight, shortcut, skip) if t is not None))
    tail = conv_tiles.Tail(
        None if bias is None else plain(bias, bias.dtype),
        None if residual is None else nhwc(residual),
        activation,
        activate_residual,
    )
    if config.form == "library":
        found = Plan(out, _library(x, weight, shortcut, skip, shortcut_weight, stride, tail, out))
        return merged(found) if moments else found
    arguments = {
        "x": nhwc(x),
        "weight": nhwc(weight.to(dtype)),
        "shortcut": None if shortcut is None else nhwc(shortcut),
        "skip": None if skip is None else nhwc(skip),
        "shortcut_weight": None if shortcut_weight is None else plain(shortcut_weight, dtype),
    }
    found = Plan(out, conv_tiles.launches(config, arguments, tail, out, stride=stride, take_moments=moments))
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
    gpu: Gpu, x: Tensor, weight: Tensor, shortcut: Tensor | None, skip: Tensor | None, stride: int, **_: Any
) -> Iterator[Config]:
    """Tiles around the heuristic's and the library."""
    return conv_tiles.space(gpu, *_sizes(x, weight, shortcut, skip, stride))


KERNELS = Implementation(
    Config, bucket, heuristic, plan, space, (conv3x3_kernel.__name__, conv_tiles.__name__, tiles.__name__)
)

conv3x3 = register(SCHEMA, reference, fake, cost, KERNELS)
conv3x3_moments = register_with_moments(conv3x3, SCHEMA, fake)
conv3x3_norm = register_with_norm(conv3x3, SCHEMA, fake)
