"""quantize_rows and layer_norm_quantize against a table of all e4m3 numbers, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import CASES, Arguments, Case
from tests.ops.contract import OperatorContract, is_exact, reference_of, tensors
from tests.ops.mathematics import altered
from tests.ops.norm.test_layer_norm import oracle as normalized
from tinysr_kernels.ops.linear.quantize import QuantizeRows, dequantized

reference, norm_reference = reference_of("quantize_rows"), reference_of("layer_norm_quantize")

E4M3 = torch.float8_e4m3fn
# Four bits of exponent with a bias of 7 and three of mantissa; the last pattern is NaN.
NUMBERS = [
    (m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7) for e, m in itertools.product(range(16), range(8))
][:-1]


def nearest(v: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """v [...,D] in float64 as (q, scale [...,groups]), q found among the table's numbers, ties to even."""
    parts = v.unflatten(-1, (groups, -1))
    scale = (parts.abs().amax(-1) / 448).clamp(min=1e-24 / 448)
    wanted = parts / scale[..., None]
    table = torch.tensor(NUMBERS, dtype=torch.float64)
    place = torch.searchsorted(table, wanted.abs().contiguous()).clamp(1, len(NUMBERS) - 1)
    below, above = table[place - 1], table[place]
    middle = (below + above) / 2
    upper = (wanted.abs() > middle) | ((wanted.abs() == middle) & (place % 2 == 0))
    return (torch.where(upper, above, below) * wanted.sign()).flatten(-2), scale


def oracle(x: Tensor) -> tuple[Tensor, Tensor]:
    return nearest(x)


def norm_oracle(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return nearest(normalized(x, eps))


def eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """In x's dtype throughout."""
    scale = (x.abs().amax(-1, keepdim=True) / 448).clamp(min=torch.finfo(x.dtype).tiny)
    return (x / scale).clamp(-448, 448).to(E4M3), scale


def norm_eager(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return eager(F.layer_norm(x, x.shape[-1:], eps=eps))


class QuantizedContract(OperatorContract):
    """An operator that returns (q, scale)."""

    channels_last = False

    def result_dtypes(self, dtype: torch.dtype, number: int) -> list[torch.dtype]:
        return [E4M3, torch.promote_types(dtype, torch.float32)]

    def test_float64(self, case: Case) -> None:
        result = self.call(case.arguments(torch.float64))
        assert [t.dtype for t in tensors(result)] == [E4M3, torch.float64]
        assert is_exact(result, self.exact(case, torch.float64))


def truncated(x: Tensor) -> tuple[Tensor, Tensor]:
    """Towards zero."""
    q, scale = reference(x)
    table = torch.tensor(NUMBERS, dtype=torch.float64)
    size = (x.double() / scale).abs()
    lower = table[(torch.searchsorted(table, size, right=True) - 1).clamp(min=0)] * q.double().sign()
    return lower.to(E4M3), scale


MUTANTS = {
    "one scale for all rows": lambda **a: (reference(**a)[0], reference(**a)[1] * 0 + reference(**a)[1].max()),
    "last feature masked": altered(reference, "x", lambda t: torch.cat([t[..., :-1], t[..., -1:] * 0], -1)),
    "largest of signed values": lambda x: (reference(x)[0], x.amax(-1, keepdim=True) / 448),
    "towards zero": truncated,
    "half the range": lambda **a: (reference(**a)[0], reference(**a)[1] * 2),
}


class TestQuantizeRows(QuantizedContract):
    op = "quantize_rows"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    mutants = MUTANTS
    mistakes = [({"x": torch.ones(())}, r"x must be \[...,D\], found \[\]")]

    def counted_flops(self, arguments: Arguments) -> int:
        """2 per element."""
        return 2 * arguments["x"].numel()


class TestLayerNormQuantize(QuantizedContract):
    op = "layer_norm_quantize"
    oracle = staticmethod(norm_oracle)
    eager = staticmethod(norm_eager)
    mutants = {
        "no norm": lambda x, eps: reference(x),
        "no eps": altered(norm_reference, "eps", lambda _: 0.0),
        "no mean": lambda x, eps: reference(x / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()),
        "scale of the input": lambda x, eps: (norm_reference(x, eps)[0], reference(x)[1]),
    }
    mistakes = [({"x": torch.ones(())}, r"x must be \[...,D\], found \[\]")]

    def counted_flops(self, arguments: Arguments) -> int:
        """7 per element."""
        return 7 * arguments["x"].numel()


def test_every_number_stays_what_it_is() -> None:
    """All of e4m3, both signs, with a row whose scale is 1; ties between neighbors go to the even one."""
    x = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)])
    q, scale = reference(x)
    assert scale.item() == 1
    assert torch.equal(q.float(), x)
    middles = (x[:126] + x[1:127]) / 2
    q, _ = reference(torch.cat([middles, x[126:127]]))
    assert torch.equal(q[:-1].float(), torch.stack([x[i + i % 2] for i in range(126)]))


@pytest.mark.parametrize("large", [1e4, 65504.0, 1e30])
def test_outliers_leave_a_row_finite(large: float) -> None:
    """The largest element is exact, however far the others are from it."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[1, 5] = -large
    q, scale = reference(x)
    back = dequantized(q, scale, torch.float32)
    assert bool(torch.isfinite(back).all())
    assert back[1, 5].item() == pytest.approx(-large, rel=1e-6)
    assert q.float().abs().amax(-1).tolist() == [448.0] * 3


@pytest.mark.parametrize("broken", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows(broken: float) -> None:
    """In its own row alone."""
    x = torch.ones(2, 64)
    x[1, 5] = broken
    for q, scale in (reference(x), norm_reference(x, 1e-6)):
        finite = torch.isfinite(dequantized(q, scale, torch.float32)).all(-1)
        assert finite.tolist() == [True, False]


def test_the_error_is_that_of_three_bits() -> None:
    """At most 1/16 of an element, or half the smallest number of the row's scale."""
    for case in CASES["quantize_rows"]:
        x = case.arguments(torch.float32)["x"]
        q, scale = reference(x)
        error = (dequantized(q, scale, torch.float32) - x).abs()
        assert bool((error <= torch.maximum(x.abs() / 16, scale * 2.0**-10) * (1 + 1e-6)).all())


def test_cost_by_hand() -> None:
    found = QuantizeRows(torch.empty(2, 7, 63, dtype=torch.bfloat16)).cost()
    assert (found.flops, found.bytes) == (2 * 882, 3 * 882 + 4 * 14)
