"""The mathematics that several references share, in plain PyTorch and in float32 or wider."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tinysr_kernels.ops.checks import ACTIVATIONS, check_choice
from tinysr_kernels.ops.layout import as_rows, nhwc

REDUCTION = 192
"""Features that one oneDNN GEMM reduces, as many as MKL's: over 1536 its error would be twice MKL's."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype references compute in: float32 for half precision, the dtype itself when it is wider."""
    return torch.promote_types(dtype, torch.float32)


def activate(t: Tensor, activation: str) -> Tensor:
    """none, relu or silu, elementwise and in place. ValueError for anything else."""
    if activation == "relu":
        return t.relu_()
    if activation == "silu":
        return torch.nn.functional.silu(t, inplace=True)
    check_choice("activation", activation, ACTIVATIONS)
    return t


def epilogue(
    y: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    activate_residual: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The epilogue of all convolutions, in y's dtype: bias, activation, residual, then one rounding.

    activation(y + bias + residual) when activate_residual, else activation(y + bias) + residual. y is overwritten: on
    a CPU, memory for a new image takes several times as long as the addition.
    """
    if bias is not None:
        y.add_(bias.to(y.dtype).view(1, -1, 1, 1))
    if residual is not None and activate_residual:
        y.add_(residual.to(y.dtype))
    activate(y, activation)
    if residual is not None and not activate_residual:
        y.add_(residual.to(y.dtype))
    return nhwc(y.to(out_dtype))


def add_shortcut_1x1(y: Tensor, shortcut: Tensor | None, skip: Tensor | None, weight: Tensor | None) -> Tensor:
    """y + weight @ concat(shortcut, skip) over channels, without the concatenated tensor; y if there is none.

    y [N,O,H,W] channels_last, overwritten; shortcut [N,C1,H,W]; skip [N,C2,H,W] or None; weight [O,C1+C2].
    """
    if shortcut is None or weight is None:
        return y
    first, second = weight.to(y.dtype).tensor_split([shortcut.shape[1]], 1)
    as_rows(y).add_(matmul(as_rows(nhwc(shortcut.to(y.dtype))), first))
    if skip is not None:
        as_rows(y).add_(matmul(as_rows(nhwc(skip.to(y.dtype))), second))
    return y


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, x [...,K], weight [O,K], bias [O], all of one dtype, as torch.nn.functional.linear.

    In float32 on a CPU by oneDNN, where torch has it: torch itself asks MKL, which leaves half an AMD processor idle.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0 or not _has_onednn():
        return torch.nn.functional.linear(x, weight, bias)
    y, parts = None, -(-x.shape[-1] // REDUCTION)
    for part, own in zip(x.reshape(-1, x.shape[-1]).chunk(parts, 1), weight.chunk(parts, 1), strict=True):
        added = torch.ops.mkldnn._linear_pointwise(part.contiguous(), own.contiguous(), bias, "none", [], "")
        y, bias = added if y is None else y.add_(added), None
    assert y is not None
    return y.view(*x.shape[:-1], weight.shape[0])


@functools.cache
def _has_onednn() -> bool:
    """Whether torch was built with oneDNN and still has the operator by which its own compiler calls it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
