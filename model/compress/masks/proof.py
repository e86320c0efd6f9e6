"""The proof at small scale: every method on objectives with all 924 masks evaluated.

`python -m model.compress masks-proof` runs it (`proof_results`); tests/model/compress/masks/test_masks_proof.py holds
the learner to its bar with the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from model.compress.masks.baselines import random_mask, sensitivity_mask, similarity_mask
from model.compress.masks.decide import Mask
from model.compress.masks.learner import History, MaskLearner, Schedule, learn
from model.compress.masks.objectives import (
    GROUP,
    KEEP,
    LAYERS,
    Network,
    Objective,
    all_masks,
    best_share,
    draw,
)

SEEDS = range(50)
"""The reported seeds. The schedule's defaults were chosen on the seeds 1000 to 1199."""
BAR = 0.8
"""Required share of seeds in which the learner's mask is among the best 1 %."""
SCHEDULE = Schedule()
LEARNERS: dict[str, tuple[int | None, bool]] = {
    "learned": (None, False),
    "learned, k = 1": (1, False),
    "learned, straight through": (None, True),
    "fixed groups": (0, False),
}
"""Method -> the reach of its transfers, and whether samples are straight-through."""
OTHERS = ("sensitivity", "similarity", "random")


@dataclass(frozen=True)
class Outcome:
    """The masks that one method chose, one per seed of a family, and the rank of each among all masks, from 1."""

    masks: list[Mask]
    ranks: list[int]

    def within(self, best: int) -> float:
        """The share of seeds whose mask is among the `best`."""
        return sum(rank <= best for rank in self.ranks) / len(self.ranks)


@dataclass(frozen=True)
class Proof:
    """A family's outcomes by method; `best` masks are the best 1 %; the best mask of every seed."""

    family: str
    seeds: list[int]
    best: int
    unreachable: int
    """Number of seeds for which fixed groups cannot reach any of the best 1 % of masks."""
    optimal: list[Mask]
    outcomes: dict[str, Outcome]


def prove(
    family: str,
    seeds: Sequence[int] = SEEDS,
    methods: Sequence[str] = (*LEARNERS, *OTHERS),
    schedule: Schedule = SCHEDULE,
) -> Proof:
    """Evaluate every mask of every objective of the family, then run every method.

    Similarity compares states and is skipped where there are none. Raises ValueError for an unknown family or method.
    """
    objective = draw(family, seeds)
    masks = all_masks()
    values = objective.exact(masks)
    best = best_share(len(masks))
    order = values.argsort(dim=-1)
    counts = masks[order[:, :best]].unflatten(-1, (-1, GROUP)).sum(-1)
    reached = (counts == KEEP * GROUP // LAYERS).all(-1).any(-1)
    outcomes = {}
    for method in methods:
        if method == "similarity" and not isinstance(objective, Network):
            continue
        chosen = choose(method, objective, seeds, schedule)
        rows = torch.tensor(chosen, dtype=masks.dtype)
        place = (rows[:, None] == masks).all(-1).int().argmax(-1)
        ranks = 1 + (values < values.gather(1, place[:, None])).sum(-1)
        outcomes[method] = Outcome(chosen, ranks.tolist())
    optimal = [tuple(row) for row in masks[order[:, 0]].bool().tolist()]
    return Proof(family, list(seeds), best, int((~reached).sum()), optimal, outcomes)


def choose(method: str, objective: Objective, seeds: Sequence[int], schedule: Schedule) -> list[Mask]:
    """The method's mask for every objective. Heuristics see the true objective, learners noisy batches of it."""
    if method in LEARNERS:
        return train(method, objective, seeds, schedule)[0].decide_all()
    if method == "random":
        return [random_mask(LAYERS, KEEP, torch.Generator().manual_seed(seed)) for seed in seeds]
    if method == "sensitivity":
        return [sensitivity_mask(_one(objective, run), LAYERS, KEEP) for run in range(len(seeds))]
    if method == "similarity" and isinstance(objective, Network):
        states = objective.states()
        return [similarity_mask([state[run] for state in states], KEEP) for run in range(len(seeds))]
    raise ValueError(f"unknown method {method!r}: one of {', '.join((*LEARNERS, *OTHERS))}")


def _one(objective: Objective, run: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The true value of one of the objectives as a function of a mask [N]."""
    return lambda mask: objective.exact(mask[None])[run]


def train(
    method: str, objective: Objective, seeds: Sequence[int], schedule: Schedule, every: int = 10
) -> tuple[MaskLearner, History]:
    """Learners of one method, one per seed, in parallel; the first seed determines all noise."""
    reach, hard = LEARNERS[method]
    learner = MaskLearner(LAYERS, group=GROUP, keep=KEEP * GROUP // LAYERS, reach=reach, runs=len(seeds))
    generator = torch.Generator().manual_seed(seeds[0])
    history = learn(
        learner,
        lambda activities: objective.noisy(activities, generator).mean(-1).sum(),
        replace(schedule, hard=hard),
        generator=generator,
        every=every,
    )
    return learner, history
