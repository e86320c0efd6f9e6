"""Run a chain of blocks with some of them skipped: x + m (block(x) - x), equation 1 of arXiv 2508.17434."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

State = TypeVar("State", Tensor, tuple[Tensor | None, ...])
"""Input and output of a block: tokens, or tokens and context; an output that a block no longer has is None."""


def bypass(blocks: Sequence[Callable[[State], State]], x: State, activity: Tensor | Sequence[bool]) -> State:
    """The chain's result where block i counts with activity[i].

    `activity` is a mask, whose skipped blocks are not run; or a tensor [N], or [batch,N] for one mask per sample, with
    values in [0,1], where every block is run so that its gradient tells what the block would have changed. Raises
    ValueError unless there is one activity per block.
    """
    number = activity.shape[-1] if isinstance(activity, Tensor) else len(activity)
    if number != len(blocks):
        raise ValueError(f"{number} activities for {len(blocks)} blocks")
    for i, block in enumerate(blocks):
        if isinstance(activity, Tensor):
            x = blend(x, block(x), activity[..., i])
        elif activity[i]:
            x = block(x)
    return x


def blend(before: State, after: State, m: Tensor) -> State:
    """before + m (after - before) for every part; m [] or [batch]. What either lacks is None."""
    if isinstance(before, Tensor):
        return _blend(before, after, m)
    pairs = zip(before, after, strict=True)
    return tuple(None if old is None or new is None else _blend(old, new, m) for old, new in pairs)


def _blend(before: Tensor, after: Tensor, m: Tensor) -> Tensor:
    weight = m.to(after.dtype)
    return torch.lerp(before, after, weight.reshape(*weight.shape, *[1] * (after.ndim - weight.ndim)))
