"""Memory layouts: channels_last images, contiguous operands, and the bytes that tensors occupy."""

from __future__ import annotations

import typing

import torch
from torch import Tensor


@typing.overload
def contiguous_as(t: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...
@typing.overload
def contiguous_as(t: None, dtype: torch.dtype | None = None) -> None: ...
@typing.overload
def contiguous_as(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None: ...


def contiguous_as(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """t in `dtype` (its own, if None) and contiguous memory, None for None.

    Libraries pick their algorithm, and so the rounding, by the strides: a dimension of one element, which may keep any
    stride otherwise, gets the canonical one.
    """
    if t is None:
        return None
    # Every launch asks for every operand, which nearly always is what it should be: views cost microseconds.
    if dtype in (None, t.dtype) and _is_canonical(t):
        return t
    # Converted and laid out in one copy, and no second one.
    t = t.to(dtype or t.dtype, memory_format=torch.contiguous_format)
    return t.contiguous().view(-1).view(t.shape)


def _is_canonical(t: Tensor) -> bool:
    """Whether the strides of all dimensions are those of new memory, those of one element too."""
    expected = 1
    for size, stride in zip(reversed(t.shape), reversed(t.stride()), strict=True):
        if stride != expected:
            return False
        expected *= size
    return True


@typing.overload
def nhwc(t: Tensor) -> Tensor: ...
@typing.overload
def nhwc(t: None) -> None: ...
@typing.overload
def nhwc(t: Tensor | None) -> Tensor | None: ...


def nhwc(t: Tensor | None) -> Tensor | None:
    """[N,C,H,W] dense in channels_last memory order, no copy when it already is; None for None."""
    if t is None:
        return None
    t = t.contiguous(memory_format=torch.channels_last)
    _, c, h, w = t.shape
    # A single channel or pixel may keep other strides, which libraries would take for another layout.
    strides = (h * w * c, 1, w * c, c)
    return t if t.stride() == strides else t.as_strided(t.shape, strides)


def empty_nhwc(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized channels_last tensor on the device of `like`, of its dtype unless one is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def as_rows(t: Tensor) -> Tensor:
    """The pixels of an image [N,C,H,W] in channels_last memory as rows [N*H*W,C], a view."""
    return t.permute(0, 2, 3, 1).view(-1, t.shape[1])


def widest_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which a GEMM of these operands runs; networks give them all the same."""
    found = [t.dtype for t in tensors if t is not None]
    dtype = found[0]
    for other in found[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def nbytes(*tensors: Tensor | None) -> int:
    """Bytes of the given tensors together.

    None counts nothing, a tensor given twice counts once, a broadcast view counts its own storage only.
    """
    distinct = {id(t): t for t in tensors if t is not None}
    return sum(_distinct_elements(t) * t.element_size() for t in distinct.values())


def _distinct_elements(t: Tensor) -> int:
    """Elements of t with memory of their own: dimensions of stride 0 count once."""
    count = 1
    for extent, stride in zip(t.shape, t.stride(), strict=True):
        count *= extent if stride else 1
    return count


def dtype_name(t: Tensor) -> str:
    """The name of t's dtype without `torch.`, as buckets carry it."""
    return str(t.dtype).removeprefix("torch.")
