"""Distributions over the masks of a group of blocks, sampled with Gumbel-Softmax (arXiv 2508.17434, section 3.1)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def group_masks(size: int, keep: int) -> Tensor:
    """[C,size] float32 of zeros and ones: every way to keep `keep` of `size` blocks, in lexical order.

    Raises ValueError unless 0 <= keep <= size.
    """
    if not 0 <= keep <= size:
        raise ValueError(f"{keep} blocks cannot be kept of a group of {size}")
    masks = torch.zeros(len(list(itertools.combinations(range(size), keep))), size)
    for mask, kept in zip(masks, itertools.combinations(range(size), keep), strict=True):
        mask[list(kept)] = 1.0
    return masks


def marginals(probabilities: Tensor, masks: Tensor) -> Tensor:
    """pi_i = sum over masks of p(m) m_i; probabilities [...,C], masks [C,B] -> [...,B]."""
    return probabilities @ masks


def gumbel_softmax(
    logits: Tensor, temperature: float, *, hard: bool = True, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A differentiable draw from softmax(logits): weights [...,C] that sum to one, and the option drawn [...].

    The option is an exact sample of the distribution (Gumbel's trick). With `hard` the weights are its one-hot vector
    and carry the gradient of the relaxed ones (straight through); else they are the relaxed ones,
    softmax((logits + g) / temperature). A logit of minus infinity is never drawn. Raises ValueError for a temperature
    that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, not {temperature}")
    noise = torch.empty_like(logits).exponential_(generator=generator)
    relaxed = ((logits - noise.clamp_min(torch.finfo(noise.dtype).tiny).log()) / temperature).softmax(-1)
    option = relaxed.detach().argmax(-1)
    if not hard:
        return relaxed, option
    exact = torch.zeros_like(relaxed).scatter_(-1, option.unsqueeze(-1), 1.0)
    return exact + (relaxed - relaxed.detach()), option
