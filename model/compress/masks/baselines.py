"""All methods of choosing a mask: random, similarity, sensitivity, fixed groups, and the learner."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from model.compress.masks.decide import Mask, keep_per_group
from model.compress.masks.learner import MaskLearner, Schedule, learn

METHODS = ("random", "similarity", "sensitivity", "fixed", "learned")


@dataclass(frozen=True)
class Subject:
    """What is pruned: a network of `layers` blocks, with the callables that the chosen method needs."""

    layers: int
    loss: Callable[[Tensor], Tensor] | None = None
    """Activities [...,N] to the loss, averaged over the leading axes; used by sensitivity and the learners."""
    states: Callable[[], Sequence[Tensor]] | None = None
    """The N + 1 states before, between and after the blocks of the whole network, [...,D]; used by similarity."""


def select(
    method: str,
    subject: Subject,
    keep: int,
    *,
    group: int = 4,
    schedule: Schedule | None = None,
    seed: int = 0,
) -> Mask:
    """The mask that keeps `keep` of the subject's blocks by one of METHODS.

    The learners train with `schedule`; random, and the noise of the learners, follow `seed`. Raises ValueError for an
    unknown method, a count that the groups cannot give, and a subject that lacks what the method asks.
    """
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        return random_mask(subject.layers, keep, generator)
    if method == "similarity":
        if subject.states is None:
            raise ValueError("similarity asks for the states between the blocks")
        return similarity_mask(subject.states(), keep)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: one of {', '.join(METHODS)}")
    if subject.loss is None:
        raise ValueError(f"{method} asks for the loss")
    if method == "sensitivity":
        return sensitivity_mask(subject.loss, subject.layers, keep)
    each = keep_per_group(subject.layers, keep, group)
    reach = 0 if method == "fixed" else None
    learner = MaskLearner(subject.layers, group=group, keep=each, reach=reach)
    learn(learner, subject.loss, schedule or Schedule(), generator=generator)
    return learner.decide()


def random_mask(layers: int, keep: int, generator: torch.Generator | None = None) -> Mask:
    """`keep` of `layers` blocks, uniformly at random."""
    _check(layers, keep)
    return highest(torch.rand(layers, generator=generator), keep)


def similarity_mask(states: Sequence[Tensor], keep: int) -> Mask:
    """The blocks with the highest influence are kept; see `influence`."""
    return highest(influence(states), keep)


def influence(states: Sequence[Tensor]) -> Tensor:
    """[N]: 1 - cos(x_i, x_{i+1}) over the last axis, averaged: ShortGPT's block influence (arXiv 2403.03853).

    `states` are the N + 1 states before, between and after the blocks. Raises ValueError for fewer than two.
    """
    if len(states) < 2:
        raise ValueError("at least one block, hence two states")
    return torch.stack([1 - F.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(states)])


@torch.no_grad()
def sensitivity_mask(loss: Callable[[Tensor], Tensor], layers: int, keep: int) -> Mask:
    """Keep the blocks whose removal, one at a time, raises the loss most."""
    _check(layers, keep)
    return highest(torch.stack([loss(1 - row).reshape(()) for row in torch.eye(layers)]), keep)


def highest(score: Tensor, keep: int) -> Mask:
    """The `keep` blocks with the highest score [N]; ties: the first."""
    _check(len(score), keep)
    kept = score.argsort(descending=True, stable=True)[:keep].tolist()
    return tuple(i in kept for i in range(len(score)))


def _check(layers: int, keep: int) -> None:
    if not 1 <= keep <= layers:
        raise ValueError(f"of {layers} blocks 1 to {layers} can be kept, not {keep}")
