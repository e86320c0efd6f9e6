"""Mask learning: the distributions p(m) of every group and q(t) of every pair, and the loop that trains them.

Sections 3.1 and 3.3 of arXiv 2508.17434, with TinyFusion's temperature schedule (arXiv 2412.01199).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.compress.masks import decide
from model.compress.masks.decide import Mask
from model.compress.masks.distributions import group_masks, gumbel_softmax, marginals
from model.compress.masks.transfers import feasible, options


class MaskLearner(nn.Module):
    """Learnable probabilities of the masks that keep `keep` blocks of every group, and of transfers between groups.

    Parameters: `groups` [K,C], logits of p over the C masks of each of K groups; `transfers` [K-1,2r+1], logits of q
    over the left group of each neighboring pair gaining -r..r blocks. r is `reach`; 1 is the paper's {m-, m, m+}, 0
    leaves the groups fixed, the default is the most that a group can give and take, which frees the split entirely
    where there are three groups. `runs` puts that many independent learners side by side, [runs] in front of every
    shape below. Raises ValueError for blocks that do not divide into groups and counts that cannot be had.
    """

    masks: Tensor

    def __init__(
        self, layers: int, *, group: int = 4, keep: int = 2, reach: int | None = None, runs: int | None = None
    ) -> None:
        super().__init__()
        self.layers, self.group, self.keep = layers, group, keep
        self.reach = min(keep, group - keep) if reach is None else reach
        number = decide.check_groups(layers, group, keep, self.reach)
        self.register_buffer("masks", group_masks(group, keep))
        front = () if runs is None else (runs,)
        self.groups = nn.Parameter(torch.zeros(*front, number, len(self.masks)))
        self.transfers = nn.Parameter(torch.zeros(*front, number - 1, 2 * self.reach + 1))

    @property
    def changes(self) -> list[int]:
        """Possible gains of a pair's left group."""
        return list(range(-self.reach, self.reach + 1))

    def probabilities(self) -> Tensor:
        """p [K,C]."""
        return self.groups.softmax(-1)

    def transfer_probabilities(self) -> Tensor:
        """q [K-1,2r+1]."""
        return self.transfers.softmax(-1)

    def marginals(self) -> Tensor:
        """pi [N]: probability that each block is kept, before transfers."""
        return marginals(self.probabilities(), self.masks).flatten(-2)

    def sample(
        self,
        temperature: float,
        number: int | None = None,
        *,
        hard: bool = True,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Activities [N], or [number,N]: differentiable, in [0,1], with `keep` blocks per group on average active.

        With `hard` they are a mask of zeros and ones with straight-through gradients, else relaxed. Pairs are
        transferred one after the other, from the first blocks to the last; a transfer that a group cannot give or take
        is not drawn. Which blocks change follows from pi; blocks with the same pi are equally likely to.
        """
        logits, q = (_repeated(parameter, number) for parameter in (self.groups, self.transfers))
        weights, option = gumbel_softmax(logits, temperature, hard=hard, generator=generator)
        relaxed = list((weights @ self.masks).unbind(-2))
        active = list((self.masks[option] > 0.5).unbind(-2))
        pi = marginals(logits.detach().softmax(-1), self.masks)
        # Marginals that differ do so by more than this; only ties are broken at random.
        pi = pi + 1e-6 * torch.empty_like(pi).uniform_(generator=generator)
        for j in range(q.shape[-2] if self.reach else 0):
            counts = active[j].sum(-1), active[j + 1].sum(-1)
            possible = feasible(*counts, self.changes, self.group)
            drawn, index = gumbel_softmax(
                q[..., j, :].masked_fill(~possible, -torch.inf), temperature, hard=hard, generator=generator
            )
            for side, changes in ((j, self.changes), (j + 1, [-c for c in self.changes])):
                soft, exact = options(relaxed[side], active[side], pi[..., side, :], changes)
                relaxed[side] = (drawn.unsqueeze(-1) * soft).sum(-2)
                active[side] = exact.take_along_dim(index[..., None, None], dim=-2).squeeze(-2)
        return torch.cat(relaxed, dim=-1)

    def decide(self) -> Mask:
        """The mask: per pair the transfer with the largest q, then blocks by pi. ValueError where there are runs."""
        if self.groups.ndim != 2:
            raise ValueError("several runs: use decide_all")
        return self._decide(self.groups, self.transfers)

    def decide_all(self) -> list[Mask]:
        """The mask of every run."""
        if self.groups.ndim != 3:
            raise ValueError("one run: use decide")
        return [self._decide(*logits) for logits in zip(self.groups, self.transfers, strict=True)]

    def _decide(self, groups: Tensor, transfers: Tensor) -> Mask:
        """From logits [K,C] and [K-1,2r+1]. Fixed groups take their most probable mask, as TinyFusion does."""
        if not self.reach:
            return tuple(self.masks[groups.argmax(-1)].flatten().bool().tolist())
        # The largest logit is the largest q, and stays so where probabilities round to zero.
        counts = decide.transferred(transfers.tolist(), self.keep, self.group)
        return decide.by_marginals(marginals(groups.softmax(-1), self.masks).tolist(), counts)

    def extra_repr(self) -> str:
        return f"{self.layers} blocks, {self.keep} of every {self.group}, reach {self.reach}"


def _repeated(logits: Tensor, number: int | None) -> Tensor:
    """[...,K,C] -> [...,number,K,C], the same logits for every sample; as they are where number is None."""
    if number is None:
        return logits
    return logits.unsqueeze(-3).expand(*logits.shape[:-2], number, *logits.shape[-2:])


@dataclass(frozen=True)
class Schedule:
    """How the probabilities are trained. Temperatures decrease geometrically from `start` to `end`."""

    steps: int = 400
    start: float = 1.0
    end: float = 0.1
    learning_rate: float = 0.1
    """Of the logits of p, with Adam; TinyFusion's 1e-3 on logits scaled by 100 is the same step."""
    transfer_share: float = 0.2
    """Ratio of q's learning rate to p's: the value of a transfer is known only after a group knows its blocks."""
    samples: int = 16
    """Masks sampled per step; a network may use one per sample of its batch."""
    hard: bool = False
    """Sample binary masks with straight-through gradients instead of relaxed ones.

    Their gradient is the loss's slope where a block is off or on, not what switching it would change, which misleads
    in a network: docs/compression/masks.md has the figures.
    """

    def temperature(self, step: int) -> float:
        """The temperature of step 0..steps-1."""
        done = step / max(1, self.steps - 1)
        return math.exp((1 - done) * math.log(self.start) + done * math.log(self.end))


@dataclass
class History:
    """The probabilities over training: one row every `every` steps and one after the last."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    marginals: list[Tensor] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)
    transfers: list[Tensor] = field(default_factory=list)

    def record(self, step: int, loss: float, learner: MaskLearner) -> None:
        """Add a row."""
        with torch.no_grad():
            self.steps.append(step)
            self.losses.append(loss)
            self.marginals.append(learner.marginals())
            self.groups.append(learner.probabilities())
            self.transfers.append(learner.transfer_probabilities())

    def run(self, index: int) -> History:
        """The rows of one of several independent runs; the losses stay those of all."""
        parts = ([row[index] for row in rows] for rows in (self.marginals, self.groups, self.transfers))
        return History(self.steps, self.losses, *parts)


def learn(
    learner: MaskLearner,
    loss: Callable[[Tensor], Tensor],
    schedule: Schedule,
    *,
    network: Iterable[nn.Parameter] = (),
    network_rate: float = 5e-5,
    generator: torch.Generator | None = None,
    every: int = 10,
) -> History:
    """Train probabilities and, together with them, the network's LoRA parameters.

    `loss` takes activities [samples,N] and returns the loss on a new batch with every call; equation 11's sum
    of task loss and distillation is in losses.py. The network learns with AdamW at the paper's rate. Raises
    FloatingPointError for a loss that is not finite.
    """
    optimizer = torch.optim.AdamW(
        [
            {"params": [learner.groups], "lr": schedule.learning_rate},
            {"params": [learner.transfers], "lr": schedule.learning_rate * schedule.transfer_share},
            {"params": list(network), "lr": network_rate},
        ],
        weight_decay=0.0,
    )
    history = History()
    for step in range(schedule.steps):
        activities = learner.sample(
            schedule.temperature(step), schedule.samples, hard=schedule.hard, generator=generator
        )
        value = loss(activities)
        if not torch.isfinite(value.detach()).all():
            raise FloatingPointError(f"the loss is {float(value.detach())} in step {step}")
        if step % every == 0:
            history.record(step, float(value.detach()), learner)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
    history.record(schedule.steps, float(value.detach()), learner)
    return history
