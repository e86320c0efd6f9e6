"""Synthetic objectives small enough to evaluate every mask: models of the loss of a pruned network of 12 blocks.

Each is a seeded function of the activities with interactions between blocks, differentiable, equal to the true
objective at masks of zeros and ones, and noisy wherever it is asked for training, as the loss of a batch is. The
families:

- `pairwise`: every block has a value and every pair of blocks an interaction, of equal total variance;
- `neighbors`: the same, but blocks close to each other are redundant, as in trained networks;
- `unbalanced`: pairwise objectives none of whose best 1 % of masks keeps two blocks in each group of four, so that
  fixed groups cannot reach them;
- `lopsided`: those of them whose best mask keeps all or none of a group, such as 4 + 1 + 1 or 3 + 3 + 0;
- `network`: a residual network with random weights and the L1 distance of its output from that of all blocks.

Nothing here depends on how a mask is found: rejection of a draw depends only on the ranking of all masks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.compress.masks.bypass import bypass

LAYERS, KEEP, GROUP = 12, 6, 4
FAMILIES = ("pairwise", "neighbors", "unbalanced", "lopsided", "network")
NOISE = 0.5
"""Noise of a batch's coefficients, relative to the root mean square of the coefficients."""
DATA, BATCH, WIDTH = 128, 4, 8
"""Number of inputs of a network, inputs per batch, features per input."""


class Objective(Protocol):
    """R objectives in parallel, one per seed; lower is better."""

    def exact(self, masks: Tensor) -> Tensor:
        """Masks [M,N] of zeros and ones, the same for every objective -> the true values [R,M]."""

    def noisy(self, activities: Tensor, generator: torch.Generator) -> Tensor:
        """[R,S,N] -> [R,S] on one batch, new with every call."""


def all_masks(layers: int = LAYERS, keep: int = KEEP) -> Tensor:
    """[M,N] float32: every mask that keeps `keep` of `layers` blocks; 924 for 6 of 12."""
    rows = list(itertools.combinations(range(layers), keep))
    return torch.zeros(len(rows), layers).scatter_(1, torch.tensor(rows), 1.0)


def best_share(number: int) -> int:
    """How many of `number` masks are the best 1 %: 9 of 924."""
    return number // 100


def draw(family: str, seeds: Sequence[int]) -> Objective:
    """The family's objectives for the seeds; ValueError for an unknown family."""
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}: one of {', '.join(FAMILIES)}")
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if family == "network":
        inner, outer = (torch.stack(part) for part in zip(*map(_weights, generators), strict=True))
        return Network(inner, outer, torch.stack([torch.randn(DATA, WIDTH, generator=g) for g in generators]))
    pairs = [_pairwise(family, generator) for generator in generators]
    value, interaction = (torch.stack(part) for part in zip(*pairs, strict=True))
    return Pairwise(value, interaction)


# ----------------------------------------------------------------------------------------------------- pairwise
@dataclass(frozen=True)
class Pairwise:
    """sum_ij W_ij m_i m_j - sum_i a_i m_i; value [R,N], interaction [R,N,N] above the diagonal."""

    value: Tensor
    interaction: Tensor

    def exact(self, masks: Tensor) -> Tensor:
        return _quadratic(masks, self.value, self.interaction)

    def noisy(self, activities: Tensor, generator: torch.Generator) -> Tensor:
        value, interaction = (
            c + NOISE * torch.randn(c.shape, generator=generator) * _spread(c) for c in (self.value, self.interaction)
        )
        return _quadratic(activities, value, interaction)


def _quadratic(m: Tensor, value: Tensor, interaction: Tensor) -> Tensor:
    return ((m @ interaction) * m).sum(-1) - (m @ value.unsqueeze(-1)).squeeze(-1)


def _spread(coefficients: Tensor) -> Tensor:
    """Per objective the root mean square of what is not zero, and zero where the coefficient is: the same shape."""
    there = coefficients != 0
    over = tuple(range(1, coefficients.ndim))
    mean = coefficients.square().sum(over, keepdim=True) / there.sum(over, keepdim=True)
    return mean.sqrt() * there


def _pairwise(family: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Value [N] and interaction [N,N] of one objective."""
    masks = all_masks()
    while True:
        value = torch.randn(LAYERS, generator=generator)
        # Five other blocks are kept: their interactions with one block add up to a variance of one, as its value has.
        interaction = torch.randn(LAYERS, LAYERS, generator=generator).triu(1) / math.sqrt(KEEP - 1)
        if family == "neighbors":
            place = torch.arange(LAYERS)
            near = torch.exp(-(place - place[:, None] - 1).clamp_min(0) / 2)
            interaction = (near * (0.5 + interaction)).triu(1)
        if family in ("pairwise", "neighbors"):
            return value, interaction
        best = masks[_quadratic(masks, value, interaction).argsort()[: best_share(len(masks))]]
        counts = best.unflatten(-1, (-1, GROUP)).sum(-1)
        balanced = (counts == KEEP * GROUP // LAYERS).all(-1).any()
        lopsided = bool(((counts[0] == 0) | (counts[0] == GROUP)).any())
        if not balanced and (lopsided or family == "unbalanced"):
            return value, interaction


# ------------------------------------------------------------------------------------------------------ network
@dataclass(frozen=True)
class Network:
    """Blocks x + tanh(x U_i) V_i, of different strength and partly alike; mean |y(m) - y(all)| over a data set.

    inner, outer [R,N,D,D]; the data set [R,T,D]. A batch of training is a part of it.
    """

    inner: Tensor
    outer: Tensor
    inputs: Tensor

    def exact(self, masks: Tensor) -> Tensor:
        values = torch.empty(len(self.inputs), len(masks))
        whole = self.states()[-1]

        def follow(rows: Tensor, i: int, x: Tensor) -> None:
            """Masks that agree before block i share the output x of the blocks before it."""
            if i == masks.shape[1]:
                values[:, rows] = (x - whole).abs().mean((-2, -1))[:, None]
                return
            on = masks[rows, i] > 0.5
            if on.any():
                follow(rows[on], i + 1, self._block(i, x))
            if not on.all():
                follow(rows[~on], i + 1, x)

        follow(torch.arange(len(masks)), 0, self.inputs)
        return values

    def noisy(self, activities: Tensor, generator: torch.Generator) -> Tensor:
        samples = activities.shape[1]
        runs, number, width = self.inputs.shape
        chosen = torch.randint(number, (runs, BATCH, 1), generator=generator).expand(-1, -1, width)
        whole = x = self.inputs.gather(1, chosen)
        for i in range(activities.shape[-1]):
            whole = self._block(i, whole)

        def block(i: int) -> Callable[[Tensor], Tensor]:
            return lambda state: self._block(i, state.flatten(1, 2)).unflatten(1, (samples, BATCH))

        blocks = [block(i) for i in range(activities.shape[-1])]
        y = bypass(blocks, x[:, None].expand(-1, samples, -1, -1), activities)
        return (y - whole[:, None]).abs().mean((-2, -1))

    def states(self) -> list[Tensor]:
        """[R,T,D] before, between and after the blocks, with every block."""
        found = [self.inputs]
        for i in range(self.inner.shape[1]):
            found.append(self._block(i, found[-1]))
        return found

    def _block(self, i: int, x: Tensor) -> Tensor:
        """x [R,T,D] -> [R,T,D]."""
        return x + (x @ self.inner[:, i]).tanh() @ self.outer[:, i]


def _weights(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """U and V [N,D,D]: every block is half one of four shared blocks; its scale is log-normal."""
    common = torch.randn(4, 2, WIDTH, WIDTH, generator=generator)
    own = torch.randn(LAYERS, 2, WIDTH, WIDTH, generator=generator)
    which = torch.randint(4, (LAYERS,), generator=generator)
    mixed = (common[which] + own) / math.sqrt(2 * WIDTH)
    strength = 0.5 * torch.randn(LAYERS, generator=generator).mul(0.5).exp()
    return mixed[:, 0], mixed[:, 1] * strength[:, None, None]
