"""The pieces the float64 oracles share: plain indexing and sums, no convolution of the library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def gather(x: Tensor, rows: Tensor, columns: Tensor, border: float | None = 0.0) -> Tensor:
    """x[n,c,rows[i],columns[j]]; outside the image `border`, or the nearest pixel when border is None."""
    h, w = x.shape[2:]
    taken = x[:, :, rows.clamp(0, h - 1)[:, None], columns.clamp(0, w - 1)]
    if border is None:
        return taken
    inside = ((rows >= 0) & (rows < h))[:, None] & ((columns >= 0) & (columns < w))
    return torch.where(inside, taken, border)


def tap(x: Tensor, i: int, j: int, stride: int = 1) -> Tensor:
    """x[n,c, s*y+i-1, s*x+j-1] with zeros outside, for every output pixel of a 3x3 convolution."""
    h, w = x.shape[2:]
    return gather(x, torch.arange(0, h, stride) + i - 1, torch.arange(0, w, stride) + j - 1)


def enlarge(x: Tensor) -> Tensor:
    """u[n,c,y,x] = x[n,c,y//2,x//2]."""
    h, w = x.shape[2:]
    return gather(x, torch.arange(2 * h) // 2, torch.arange(2 * w) // 2)


def sigmoid_times(v: Tensor) -> Tensor:
    """v / (1 + exp(-v)), that is SiLU."""
    return v / (1 + torch.exp(-v))


def epilogue(
    v: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    activation: str = "none",
    activate_residual: bool = True,
) -> Tensor:
    """What follows the sums of a convolution v, term by term."""
    if shortcut is not None:
        tensors = [shortcut] if skip is None else [shortcut, skip]
        channels = [channel for t in tensors for channel in t.unbind(1)]
        for k, channel in enumerate(channels):
            v = v + shortcut_weight[None, :, k, None, None] * channel[:, None]
    if bias is not None:
        v = v + bias[None, :, None, None]
    if residual is not None and activate_residual:
        v = v + residual
    v = {"none": lambda t: t, "relu": lambda t: t.clamp(min=0), "silu": sigmoid_times}[activation](v)
    return v + residual if residual is not None and not activate_residual else v


def eager_epilogue(
    v: Tensor,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    skip: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    activation: str = "none",
    activate_residual: bool = True,
) -> Tensor:
    """The same in PyTorch's own operations in v's dtype, as a network written without fusion has it."""
    if shortcut is not None:
        joined = shortcut if skip is None else torch.cat([shortcut, skip], 1)
        v = v + F.conv2d(joined, shortcut_weight[:, :, None, None])
    if residual is not None and activate_residual:
        v = v + residual
    v = {"none": lambda t: t, "relu": torch.relu, "silu": F.silu}[activation](v)
    return v + residual if residual is not None and not activate_residual else v


def altered(function: Any, name: str, edit: Any) -> Any:
    """`function` with argument `name` passed through `edit` when it is given: a deliberate mistake."""

    def run(**arguments: Any) -> Any:
        value = arguments.get(name)
        return function(**arguments if value is None else {**arguments, name: edit(value)})

    return run


def zeroed(t: Tensor, *index: Any) -> Tensor:
    """A copy of t with t[index] = 0."""
    t = t.clone()
    t[index] = 0
    return t
