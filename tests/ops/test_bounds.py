"""The bound of bounds.py admits float32 sums in any order and nothing narrower."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.ops.bounds import Verdict, judge
from tests.ops.cases import Case
from tests.ops.contract import DRAWS
from tests.ops.linear import test_linear

Step = Callable[[Tensor], Tensor]

CASES_OF_SUMS = [
    Case("linear", f"{k} summands", lambda d, k=k: {"x": d.tokens(2, 3, k), "weight": d.weight(5, k)})
    for k in (3, 30, 240, 2160)
]


def cut(t: Tensor, bits: int) -> Tensor:
    """Float32 rounded to this many bits of mantissa."""
    step = 1 << 23 - bits
    return ((t.contiguous().view(torch.int32) + step // 2) & -step).view(torch.float32)


def in_a_row(s: Tensor, keep: Step = lambda t: t) -> Tensor:
    """The sum over the last dimension, one summand after the other, each partial sum kept as `keep` has it."""
    total = torch.zeros_like(s[..., 0])
    for part in s.unbind(-1):
        total = keep(total + part)
    return total


def by_halves(s: Tensor) -> Tensor:
    while s.shape[-1] > 1:
        first, second = s.tensor_split(2, -1)
        s = torch.cat([first[..., : second.shape[-1]] + second, first[..., second.shape[-1] :]], -1)
    return s[..., 0]


SUMS: dict[str, Step] = {
    "in a row": in_a_row,
    "backwards": lambda s: in_a_row(s.flip(-1)),
    "by size": lambda s: in_a_row(s.gather(-1, s.abs().argsort(-1))),
    "in 8 lanes": lambda s: in_a_row(
        in_a_row(torch.nn.functional.pad(s, (0, -s.shape[-1] % 8)).unflatten(-1, (8, -1)))
    ),
    "by halves": by_halves,
}


def verdict(case: Case, sum_of: Step, operand: Step = lambda t: t) -> Verdict:
    """Of a product without an epilogue, by the arithmetic alone: eager errs by one rounding of the result."""
    contract = test_linear.TestLinear
    arguments = [case.arguments(torch.float32, draw) for draw in range(DRAWS)]
    results = [sum_of(operand(a["x"])[..., None, :] * operand(a["weight"])) for a in arguments]
    exacts = [contract.exact(case, torch.float32, draw) for draw in range(DRAWS)]
    pairs = [pair for draw in range(DRAWS) for pair in contract.responses(case, torch.float32, draw)]
    return judge(results, [e.float() for e in exacts], exacts, lambda: pairs)


@pytest.mark.parametrize("order", list(SUMS))
@pytest.mark.parametrize("case", CASES_OF_SUMS, ids=str)
def test_sums_in_any_order_are_admitted(order: str, case: Case) -> None:
    found = verdict(case, SUMS[order])
    assert found.holds, found


@pytest.mark.parametrize("case", CASES_OF_SUMS, ids=str)
def test_sums_of_less_than_float32_are_caught(case: Case) -> None:
    """The operands in TF32, of 10 bits of mantissa, or in half precision; partial sums in bfloat16 or of 16 bits."""
    assert not verdict(case, in_a_row, lambda t: cut(t, 10)).holds
    assert not verdict(case, in_a_row, lambda t: t.half().float()).holds
    assert not verdict(case, lambda s: in_a_row(s, lambda t: t.bfloat16().float())).holds
    assert not verdict(case, lambda s: in_a_row(s, lambda t: cut(t, 16))).holds


def test_nan_is_caught() -> None:
    exact = torch.ones(3, dtype=torch.float64)
    broken = torch.tensor([1.0, math.nan, 1.0])
    assert not judge([broken], [exact.float()], [exact], lambda: [(exact * 2, exact)]).holds
    assert judge([exact.float()], [exact.float()], [exact]).holds


def test_the_random_walk_is_that_of_float32() -> None:
    """Sums in a row err less than derived, because most roundings are by less than u, but not much less."""
    generator = torch.Generator().manual_seed(0)
    for terms in (10, 100, 1000):
        s = torch.randn(4000, terms, generator=generator)
        exact = s.double().sum(-1)
        error = (in_a_row(s) - exact).square().mean()
        expected = terms / 2 * 2.0**-48 / 3 * s.double().square().sum(-1).mean()
        assert 0.3 < error / expected < 1, terms
