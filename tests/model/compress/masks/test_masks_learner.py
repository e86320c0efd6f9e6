"""The learner, the blocks it switches, what it minimizes, and the other ways to choose a mask."""

import pytest
import torch
from torch import Tensor, nn

from model.compress.masks import (
    METHODS,
    MaskLearner,
    Schedule,
    Subject,
    bypass,
    learn,
    mask_loss,
    random_mask,
    select,
    sensitivity_mask,
    similarity_mask,
)
from model.compress.masks.baselines import influence
from model.compress.training.lora_layers import inject, lora_parameters


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def splits(samples: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in samples.detach().unflatten(-1, (-1, 4)).sum(-1).int().tolist()}


@pytest.mark.parametrize(("reach", "number"), [(0, 1), (1, 9), (2, 19)])
def test_every_split_within_reach_is_drawn_and_the_total_stays(reach: int, number: int) -> None:
    learner = MaskLearner(12, reach=reach)
    samples = learner.sample(1.0, 4000, generator=generator())
    assert samples.shape == (4000, 12)
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    assert (samples.sum(-1) == 6).all()
    found = splits(samples)
    assert len(found) == number
    assert all(0 <= count <= 4 for split in found for count in split)


@pytest.mark.parametrize("hard", [True, False])
def test_samples_are_in_range_and_move_both_distributions(hard: bool) -> None:
    learner = MaskLearner(16)
    samples = learner.sample(0.8, 64, hard=hard, generator=generator())
    assert samples.min() >= 0
    assert samples.max() <= 1 + 1e-6  # a sum of weights that add up to one
    (samples * torch.randn(16)).sum().backward()
    for parameter in (learner.groups, learner.transfers):
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()


def test_one_sample_has_one_activity_per_block() -> None:
    assert MaskLearner(8).sample(1.0).shape == (8,)
    assert MaskLearner(8, runs=3).sample(1.0).shape == (3, 8)
    assert MaskLearner(8, runs=3).sample(1.0, 5).shape == (3, 5, 8)


def test_certain_distributions_give_the_mask_that_is_decided() -> None:
    """With all weight on one mask a group and one transfer a pair, the possible ones first, both choose the same."""
    for seed in range(20):
        learner = MaskLearner(16)
        with torch.no_grad():
            learner.groups.normal_(generator=generator(seed)).mul_(3)
            learner.transfers.normal_(generator=generator(seed)).mul_(1e4)
            best = learner.groups.argmax(-1, keepdim=True)
            learner.groups.scatter_(-1, best, 1e4)
        samples = learner.sample(1.0, 50, generator=generator(seed))
        # All marginals are 0 or 1, and sampling breaks ties at random: the counts must agree.
        assert splits(samples) == splits(torch.tensor([learner.decide()]))


def test_which_block_changes_follows_the_marginals() -> None:
    learner = MaskLearner(8, reach=1)
    with torch.no_grad():
        # Group 1 keeps blocks 0 and 1, and 2 is the next in line; group 2 keeps 4 and 5, and 5 is the weaker.
        learner.groups[0] = torch.tensor([9.0, 2.0, 0.0, 1.0, 0.0, 0.0])  # 01 02 03 12 13 23
        learner.groups[1] = torch.tensor([9.0, 2.0, 0.0, 0.0, 0.0, 0.0])
        learner.transfers[0] = torch.tensor([-99.0, -99.0, 99.0])
    sample = learner.sample(1.0, 300, generator=generator()).detach()
    common = sample[(sample[:, :2] == 1).all(-1) & (sample[:, 4] == 1)]
    assert len(common) > 200
    assert (common == torch.tensor([1.0, 1, 1, 0, 1, 0, 0, 0])).all()
    assert learner.decide() == (True, True, True, False, True, False, False, False)


def test_fixed_groups_decide_by_the_likeliest_mask() -> None:
    learner = MaskLearner(4, reach=0)
    with torch.no_grad():  # block 0 has the highest marginal, yet is in no likeliest mask
        learner.groups[0] = torch.tensor([0.29, 0.29, 1e-6, 1e-6, 1e-6, 0.42]).log()
    assert learner.decide() == (False, False, True, True)


def test_runs_are_independent_learners() -> None:
    worth = torch.stack([torch.arange(8.0), -torch.arange(8.0)])
    learner = MaskLearner(8, runs=2)
    learn(learner, lambda m: -(m * worth[:, None]).sum(-1).mean(-1).sum(), Schedule(steps=150), generator=generator())
    first, second = learner.decide_all()
    assert first == (False,) * 4 + (True,) * 4
    assert second == (True,) * 4 + (False,) * 4
    with pytest.raises(ValueError, match="decide_all"):
        learner.decide()
    with pytest.raises(ValueError, match="use decide"):
        MaskLearner(8).decide_all()


def test_temperatures_fall_from_start_to_end() -> None:
    schedule = Schedule(steps=5, start=4.0, end=0.25)
    assert [schedule.temperature(s) for s in range(5)] == pytest.approx([4, 2, 1, 0.5, 0.25])


class Chain(nn.Module):
    """Four residual blocks on tokens [N,T,6]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)) for _ in range(4))

    def forward(self, x: Tensor, activity: Tensor | tuple[bool, ...]) -> Tensor:
        return bypass([lambda x, b=b: x + b(x) for b in self.blocks], x, activity)


def test_network_and_probabilities_learn_together() -> None:
    torch.manual_seed(0)
    chain = Chain()
    inject(chain, rank=2)
    before = [p.detach().clone() for p in chain.parameters()]
    learner = MaskLearner(4)
    x = torch.randn(8, 5, 6)
    with torch.no_grad():
        teacher = chain(x, (True,) * 4)

    def loss(activities: Tensor) -> Tensor:
        student = chain(x, activities)
        return mask_loss((student - teacher).square().mean(), student, teacher)

    history = learn(
        learner,
        loss,
        Schedule(steps=40, samples=8),
        network=lora_parameters(chain),
        network_rate=1e-2,
        generator=generator(),
    )
    trained = {id(p) for p in lora_parameters(chain)}
    for old, parameter in zip(before, chain.parameters(), strict=True):
        assert torch.equal(old, parameter) == (id(parameter) not in trained)
    assert history.steps == [0, 10, 20, 30, 40]
    assert history.losses[-1] < history.losses[0]
    assert history.marginals[-1].shape == (4,)
    assert history.transfers[-1].shape == (0, 5)


def test_a_loss_that_is_not_finite_stops_the_learning() -> None:
    with pytest.raises(FloatingPointError, match="step 0"):
        learn(MaskLearner(4), lambda m: m.sum() * torch.nan, Schedule(steps=3))


# -------------------------------------------------------------------------------------------------------- blocks
def test_skipped_blocks_are_not_run() -> None:
    ran: list[int] = []

    def block(i: int, x: Tensor) -> Tensor:
        ran.append(i)
        return x + i

    blocks = [lambda x, i=i: block(i, x) for i in range(4)]
    assert bypass(blocks, torch.zeros(1), (True, False, False, True)).item() == 3
    assert ran == [0, 3]


def test_activities_blend_as_equation_1_says() -> None:
    chain, x = Chain(), torch.randn(3, 5, 6)
    mask = (True, False, True, True)
    torch.testing.assert_close(chain(x, torch.tensor(mask).float()), chain(x, mask))
    activities = torch.rand(3, 4)
    each = [chain(x[i : i + 1], activities[i]) for i in range(3)]
    torch.testing.assert_close(chain(x, activities), torch.cat(each))
    expected = x
    for block, m in zip(chain.blocks, activities[0], strict=True):
        expected = m * (expected + block(expected)) + (1 - m) * expected
    torch.testing.assert_close(chain(x, activities[0]), expected)


def test_states_of_several_parts() -> None:
    def joint(state: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        tokens, context = state
        return tokens + 2, context * 3

    def last(state: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        return state[0] * 2, None

    x, context = bypass([joint, last], (torch.ones(2, 3), torch.ones(2, 1)), torch.tensor([0.5, 1.0]))
    assert context is None
    assert torch.equal(x, torch.full((2, 3), 4.0))


def test_one_activity_per_block() -> None:
    with pytest.raises(ValueError, match="3 activities for 2 blocks"):
        bypass([torch.sin, torch.cos], torch.ones(1), torch.ones(3))
    with pytest.raises(ValueError, match="1 activities for 2 blocks"):
        bypass([torch.sin, torch.cos], torch.ones(1), (True,))


def test_loss_is_equation_11() -> None:
    student, teacher = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    task = student.square().mean()
    expected = 2 * task + 3 * (student - teacher).abs().mean()
    found = mask_loss(task, student, teacher, task_weight=2, distillation_weight=3)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert student.grad is not None
    assert teacher.grad is None
    with pytest.raises(ValueError, match="teacher"):
        mask_loss(task, student, teacher[:1])


# ----------------------------------------------------------------------------------------------------- baselines
def test_similarity_keeps_what_turns_the_state() -> None:
    """Block i turns every vector by an angle; scaling it changes nothing."""
    angles = torch.tensor([0.1, 1.0, 0.0, 0.5])
    reached = torch.cat([torch.zeros(1), angles.cumsum(0)])
    states = [3.0**i * torch.stack([a.cos(), a.sin()]).expand(7, 2) for i, a in enumerate(reached)]
    torch.testing.assert_close(influence(states), 1 - angles.cos())
    assert similarity_mask(states, 2) == (False, True, False, True)
    with pytest.raises(ValueError, match="two states"):
        influence(states[:1])


def test_sensitivity_keeps_what_the_whole_network_misses() -> None:
    worth = torch.tensor([3.0, 1.0, 2.0, 4.0])
    assert sensitivity_mask(lambda m: -(m * worth).sum(), 4, 2) == (True, False, False, True)


def test_random_masks_are_uniform_and_repeatable() -> None:
    assert random_mask(12, 6, generator(3)) == random_mask(12, 6, generator(3))
    own, number = generator(), 3000
    rows = torch.tensor([random_mask(4, 2, own) for _ in range(number)])
    _, counts = rows.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert ((counts / number - 1 / 6).abs() <= 5 * (1 / 6 * 5 / 6 / number) ** 0.5).all()


def test_every_method_in_one_call() -> None:
    """An additive loss: all but chance find the best mask that they can reach."""
    worth = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4])
    states = [torch.tensor([a.cos(), a.sin()]) for a in torch.cat([torch.zeros(1), worth.cumsum(0)]) / 50]
    subject = Subject(8, loss=lambda m: -(m * worth).sum(-1).mean(), states=lambda: states)
    masks = {method: select(method, subject, 4, schedule=Schedule(steps=150)) for method in METHODS}
    best = (True,) * 4 + (False,) * 4
    assert [masks[m] for m in ("similarity", "sensitivity", "learned")] == [best] * 3
    assert masks["fixed"] == (True, True, False, False, False, False, True, True)
    assert sum(masks["random"]) == 4


def test_choices_that_cannot_be_made() -> None:
    subject = Subject(8, loss=lambda m: m.sum())
    with pytest.raises(ValueError, match="unknown method 'best'"):
        select("best", subject, 4)
    with pytest.raises(ValueError, match="states"):
        select("similarity", subject, 4)
    with pytest.raises(ValueError, match="loss"):
        select("learned", Subject(8), 4)
    with pytest.raises(ValueError, match="not 3"):
        select("learned", subject, 3)
    for method in ("random", "sensitivity"):
        with pytest.raises(ValueError, match="not 9"):
            select(method, subject, 9)
    with pytest.raises(ValueError, match="do not divide"):
        MaskLearner(10)
