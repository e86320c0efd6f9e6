"""Distributions over masks, transfers between groups, and the decision."""

import itertools
import math

import pytest
import torch

from model.compress.masks import decide, transfers
from model.compress.masks.decide import check_groups, check_mask, keep_per_group, number_reachable, reachable
from model.compress.masks.distributions import group_masks, gumbel_softmax, marginals


@pytest.mark.parametrize(("size", "keep"), [(4, 2), (4, 0), (5, 3), (1, 1)])
def test_group_masks_are_all_ways(size: int, keep: int) -> None:
    rows = {tuple(row) for row in group_masks(size, keep).int().tolist()}
    assert rows == {row for row in itertools.product((0, 1), repeat=size) if sum(row) == keep}
    assert len(group_masks(size, keep)) == math.comb(size, keep)


def test_marginals_are_sums_over_masks() -> None:
    masks = group_masks(4, 2)
    p = torch.rand(3, 6, dtype=torch.float64).softmax(-1)
    expected = [[sum(float(p[g, c]) for c in range(6) if masks[c, i]) for i in range(4)] for g in range(3)]
    torch.testing.assert_close(marginals(p, masks.double()), torch.tensor(expected, dtype=torch.float64))


def test_draws_follow_the_distribution_and_are_one_hot() -> None:
    logits = torch.tensor([1.0, -1.0, 0.5, -torch.inf])
    number = 20000
    generator = torch.Generator().manual_seed(0)
    weights, option = gumbel_softmax(logits.expand(number, 4), 0.7, generator=generator)
    assert torch.equal(weights, torch.nn.functional.one_hot(option, 4).float())
    p = logits.softmax(-1)
    # Five standard deviations of a binomial share; what has no probability is never drawn.
    bound = 5 * (p * (1 - p) / number).sqrt()
    assert ((weights.mean(0) - p).abs() <= bound).all()


def test_straight_through_has_the_relaxed_gradient() -> None:
    value = torch.randn(5)
    grads = []
    for hard in (True, False):
        logits = torch.zeros(7, 5, requires_grad=True)
        weights, _ = gumbel_softmax(logits, 0.5, hard=hard, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(weights.sum(-1), torch.ones(7))
        (weights @ value).sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads)
    assert grads[0] is not None
    assert grads[0].abs().min() > 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperature_is_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        gumbel_softmax(torch.zeros(3), temperature)


def candidate(m: set[int], pi: list[float], k: int, *, expand: bool) -> set[int]:
    """The paper's words: blocks by descending pi join n until the union has k more, or the intersection k fewer."""
    n: set[int] = set()
    for i in sorted(range(len(pi)), key=lambda i: -pi[i]):
        if len(m | n) - len(m) == k if expand else len(m) - len(m & n) == k:
            break
        n.add(i)
    return n


@pytest.mark.parametrize("k", [1, 2])
def test_expansion_and_corrosion_as_the_paper_says(k: int) -> None:
    generator = torch.Generator().manual_seed(2)
    for kept in range(k, 7 - k):
        for mask in group_masks(6, kept):
            pi = torch.rand(6, generator=generator)
            m = {i for i in range(6) if mask[i]}
            changed, active = transfers.options(mask, mask > 0, pi, [-k, 0, k])
            restored = m | candidate(m, pi.tolist(), k, expand=True)
            left = m & candidate(m, pi.tolist(), k, expand=False)
            assert [set(row.nonzero().flatten().tolist()) for row in changed] == [left, m, restored]
            assert torch.equal(changed, active.float())


def test_ties_go_to_the_first() -> None:
    active = torch.tensor([False, True, True, False])
    assert transfers.expansion(active, torch.full((4,), 0.5), 1).tolist() == [True, False, False, False]
    assert transfers.corrosion(active, torch.full((4,), 0.5), 1).tolist() == [False, True, False, False]


def test_union_and_intersection_are_the_sets_at_the_corners_and_let_gradients_through() -> None:
    for a, b in itertools.product((0.0, 1.0), repeat=2):
        m, n = torch.tensor(a, requires_grad=True), torch.tensor(b)
        assert transfers.union(m, n).item() == max(a, b)
        assert transfers.intersection(m, n).item() == min(a, b)
        (slope,) = torch.autograd.grad(transfers.union(m, n), m)
        assert slope.item() == 1 - b
        (slope,) = torch.autograd.grad(transfers.intersection(m, n), m)
        assert slope.item() == b


def test_feasible_transfers_leave_counts_inside_the_groups() -> None:
    possible = transfers.feasible(torch.tensor([0, 2, 4]), torch.tensor([2, 2, 2]), [-2, -1, 0, 1, 2], 4)
    assert possible.tolist() == [[False, False, True, True, True], [True] * 5, [True, True, True, False, False]]


# ----------------------------------------------------------------------------------------------------- decisions
def test_decision_takes_the_likeliest_transfer_that_is_possible() -> None:
    # The first pair empties group 2, whose own gift to group 3 is then impossible: its second choice counts.
    q = [[0.0, 0.0, 0.1, 0.2, 0.7], [0.5, 0.1, 0.3, 0.1, 0.0]]
    assert decide.transferred(q, 2, 4) == [4, 0, 2]
    assert decide.transferred([[0.2] * 5, [0.2] * 5], 2, 4) == [2, 2, 2]
    assert decide.transferred([[0.1, 0.2, 0.7]], 1, 2) == [2, 0]


def test_blocks_follow_the_marginals() -> None:
    pi = [[0.1, 0.9, 0.4, 0.6], [0.5, 0.5, 0.5, 0.5]]
    assert decide.by_marginals(pi, [3, 1]) == (False, True, True, True, True, False, False, False)


def test_numbers_of_reachable_masks() -> None:
    assert number_reachable(24, 4, 2, 0) == 46_656  # the paper's count, of 2,704,156
    assert number_reachable(12, 4, 2, 0) == 216
    assert number_reachable(12, 4, 2, 2) == 924  # all of them
    masks = [row for row in itertools.product((False, True), repeat=12) if sum(row) == 6]
    for reach in (0, 1, 2):
        assert sum(reachable(mask, 4, 2, reach) for mask in masks) == number_reachable(12, 4, 2, reach)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 2), "do not divide into groups of 4"),
        ((0, 4, 2), "at least 1"),
        ((12, 4, 5), "not 5"),
        ((12, 4, 0), "not 0"),
        ((12, 4, 2, 3), "not 3"),
        ((12, 4, 3, 2), "0 to 1 blocks"),
    ],
)
def test_groups_that_cannot_be(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_groups(*arguments)


def test_counts_that_groups_cannot_give() -> None:
    assert keep_per_group(24, 12, 4) == 2
    for keep in (0, 7, 13):
        with pytest.raises(ValueError, match=f"not {keep}"):
            keep_per_group(12, keep, 4)


def test_masks_of_the_wrong_length_count_or_kind() -> None:
    assert check_mask([1, 0, 1], 3, 2) == (True, False, True)
    with pytest.raises(ValueError, match="3 entries, the network 4"):
        check_mask([1, 0, 1], 4)
    with pytest.raises(ValueError, match="keeps 2 blocks, not 1"):
        check_mask([1, 0, 1], 3, 1)
    with pytest.raises(ValueError, match="zeros and ones"):
        check_mask([1, 0, 2], 3)
