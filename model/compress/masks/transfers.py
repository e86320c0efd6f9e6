"""Dynamic Inter-block Activation and the Expansion-Corrosion strategy (arXiv 2508.17434, section 3.1).

A transfer moves k kept blocks between two neighboring groups: one group restores k of its inactive blocks
(expansion), the other removes k of its active ones (corrosion), so that the total stays. Which blocks these are follows
from the marginals pi: the candidate mask n holds the blocks to be restored, or all that are not to be removed, and the
result is the union m + n - m n or the intersection m n, through which the gradient of m flows. Choosing n is sorting;
it has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expansion(active: Tensor, pi: Tensor, number: int) -> Tensor:
    """The `number` inactive blocks with the highest pi; active [...,B] bool, pi [...,B] -> [...,B] bool.

    Among equals the first. Of fewer inactive blocks, all.
    """
    return _first(pi.masked_fill(active, -torch.inf), number) & ~active


def corrosion(active: Tensor, pi: Tensor, number: int) -> Tensor:
    """The active blocks without the `number` with the lowest pi; active [...,B] bool, pi [...,B] -> [...,B] bool.

    Among equals the first stays. Of fewer active blocks, none stays.
    """
    left = active.sum(-1, keepdim=True) - number
    return _first(pi.masked_fill(~active, -torch.inf), left) & active


def union(m: Tensor, n: Tensor) -> Tensor:
    """m + n - m n: the union of masks in {0,1}, differentiable between."""
    return m + n - m * n


def intersection(m: Tensor, n: Tensor) -> Tensor:
    """m n: the intersection of masks in {0,1}, differentiable between."""
    return m * n


def options(m: Tensor, active: Tensor, pi: Tensor, changes: list[int]) -> tuple[Tensor, Tensor]:
    """The masks that each change gives, blocks restored where it is positive and removed where it is negative.

    m [...,B] relaxed; active [...,B] bool says which of its blocks count as active; pi [...,B] decides which blocks
    change. Returns the relaxed masks [...,T,B] and the active blocks [...,T,B] bool.
    """
    relaxed, exact = [], []
    for change in changes:
        if change > 0:
            n = expansion(active, pi, change)
            relaxed.append(union(m, n.to(m.dtype)))
            exact.append(active | n)
        elif change < 0:
            n = corrosion(active, pi, -change)
            relaxed.append(intersection(m, n.to(m.dtype)))
            exact.append(active & n)
        else:
            relaxed.append(m)
            exact.append(active)
    return torch.stack(relaxed, dim=-2), torch.stack(exact, dim=-2)


def feasible(left: Tensor, right: Tensor, changes: list[int], size: int) -> Tensor:
    """Which transfers leave both groups between 0 and `size` active blocks; counts [...] -> [...,T] bool.

    A change c gives the left group c blocks more and the right group c fewer.
    """
    change = torch.tensor(changes, device=left.device)
    first, second = left.unsqueeze(-1) + change, right.unsqueeze(-1) - change
    return (first >= 0) & (first <= size) & (second >= 0) & (second <= size)


def _first(score: Tensor, number: int | Tensor) -> Tensor:
    """The `number` highest of score [...,B] as [...,B] bool; among equals the first."""
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < number
