"""linear against sums over single features."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.contract import OperatorContract, is_exact, reference_of
from tests.ops.draw import Draw
from tests.ops.mathematics import altered, zeroed
from tests.ops.norm.row_moments import RowMomentsContract, by_hand, mutants
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.ops.linear.linear import Config, Linear

reference = reference_of("linear")


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    return (x[..., None, :] * weight).sum(-1)


def row_statistics(row_moments: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [...,1] of rows of `depth` features from those of their parts, part by part."""
    mean = sum(row_moments[..., 0, p] * min(32, depth - 32 * p) for p in range(row_moments.shape[-1])) / depth
    squares = sum(
        row_moments[..., 1, p] + min(32, depth - 32 * p) * (row_moments[..., 0, p] - mean) ** 2
        for p in range(row_moments.shape[-1])
    )
    return mean[..., None], squares[..., None] / depth


def normed_matmul(x: Tensor, weight: Tensor, row_moments: Tensor, weight_sums: Tensor, eps: float) -> Tensor:
    """The matmul of normalized rows, by the sums of the weight's rows."""
    mean, variance = row_statistics(row_moments, x.shape[-1])
    return (matmul(x, weight) - mean * weight_sums) / (variance + eps).sqrt()


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    v = matmul(x, weight) if row_moments is None else normed_matmul(x, weight, row_moments, weight_sums, eps)
    if x2 is not None:
        v = v + matmul(x2, weight2)
    if bias is not None:
        v = v + bias
    if activation == "gelu_tanh":
        v = v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    elif activation == "geglu":
        half = v.shape[-1] // 2
        g = v[..., half:]
        v = v[..., :half] * g * (1 + torch.erf(g / math.sqrt(2))) / 2
    if gate is not None:
        v = v * gate
    return v if residual is None else v + residual


def normalized(x: Tensor, row_moments: Tensor | None, eps: float) -> Tensor:
    """The rows after a LayerNorm of these statistics, in x's dtype."""
    if row_moments is None:
        return x
    mean, variance = row_statistics(row_moments, x.shape[-1])
    return ((x - mean) / (variance + eps).sqrt()).to(x.dtype)


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    v = F.linear(normalized(x, row_moments, eps), weight, bias)
    if x2 is not None:
        v = v + F.linear(x2, weight2)
    if activation == "gelu_tanh":
        v = F.gelu(v, approximate="tanh")
    elif activation == "geglu":
        a, g = v.chunk(2, -1)
        v = a * F.gelu(g)
    if gate is not None:
        v = gate * v
    return v if residual is None else residual + v


def halves_swapped(**a: Any) -> Tensor:
    if a.get("activation") != "geglu":
        return reference(**a)
    half = a["weight"].shape[0] // 2
    moved = {k: a[k].roll(half, 0) for k in ("weight", "bias", "weight2") if a.get(k) is not None}
    return reference(**{**a, **moved})


def gate_on_residual(**a: Any) -> Tensor:
    if not {"gate", "residual"} <= a.keys():
        return reference(**a)
    return reference(**{**a, "residual": a["residual"] * a["gate"]})


MUTANTS = {
    "no bias": altered(reference, "bias", torch.zeros_like),
    "no gate": altered(reference, "gate", torch.ones_like),
    "no residual": altered(reference, "residual", torch.zeros_like),
    "gate on the residual": gate_on_residual,
    "no second input": altered(reference, "x2", torch.zeros_like),
    "no activation": lambda **a: reference(
        **{**a, "activation": "none" if a["activation"] == "gelu_tanh" else a["activation"]}
    ),
    "geglu halves swapped": halves_swapped,
    "features masked": altered(reference, "weight", lambda t: zeroed(t, slice(None), -1)),
    "rows shifted": altered(reference, "weight", lambda t: t.roll(1, 0)),
    "no mean": altered(reference, "weight_sums", torch.zeros_like),
    "no eps": altered(reference, "eps", lambda _: 0.0),
    "moments of another part": altered(reference, "row_moments", lambda t: t.roll(1, -1)),
    "not normalized": lambda **a: reference(**{**a, "row_moments": None, "weight_sums": None}),
}

MOMENTS, SUMS = {"row_moments": torch.ones(2, 7, 2, 2)}, {"weight_sums": torch.ones(48)}
MISTAKES = [
    ({"x": torch.ones(())}, r"x must be \[...,K\], found \[\]"),
    ({"weight": torch.ones(48)}, r"weight must be \[O,K\], found \[48\]"),
    ({"weight": torch.ones(48, 62)}, r"weight must be \[48, 63\], found \[48, 62\]"),
    ({"bias": torch.ones(1)}, r"bias must be \[48\], found \[1\]"),
    ({"gate": torch.ones(2, 7, 48)}, r"gate must be \[48\], found \[2, 7, 48\]"),
    ({"residual": torch.ones(2, 1, 48)}, r"residual must be \[2, 7, 48\], found \[2, 1, 48\]"),
    ({"activation": "gelu"}, r"activation must be one of .*'gelu_tanh'.*, found 'gelu'"),
    (
        {"weight": torch.ones(47, 63), "bias": None, "activation": "geglu"},
        "weight must have an even number of rows for geglu, found 47",
    ),
    ({"x2": torch.ones(2, 7, 5)}, "x2 and weight2 must be given together"),
    ({"x2": torch.ones(2, 6, 5), "weight2": torch.ones(48, 5)}, r"x2 must be \[2, 7, 5\], found \[2, 6, 5\]"),
    ({"x2": torch.ones(2, 7, 5), "weight2": torch.ones(48, 4)}, r"weight2 must be \[48, 5\], found \[48, 4\]"),
    ({"row_moments": torch.ones(2, 7, 2, 2)}, "row_moments and weight_sums must be given together"),
    ({"row_moments": torch.ones(2, 7, 2, 1), **SUMS}, r"row_moments must be \[2, 7, 2, 2\], found \[2, 7, 2, 1\]"),
    ({**MOMENTS, "weight_sums": torch.ones(63)}, r"weight_sums must be \[48\], found \[63\]"),
    ({**MOMENTS, **SUMS, "x2": torch.ones(2, 7, 5), "weight2": torch.ones(48, 5)}, "x2 must not be given with"),
]


class TestLinear(OperatorContract):
    op = "linear"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    channels_last = False
    same_bits_in_any_batch = False
    # The library's matmul with a single vector sums in an order that depends on the vector's alignment.
    same_bits_at_any_address = False
    mutants = MUTANTS
    mistakes = MISTAKES


class TestLinearRowMoments(RowMomentsContract):
    op = "linear_row_moments"
    oracle = staticmethod(by_hand(oracle))
    eager = staticmethod(by_hand(eager))
    same_bits_at_any_address = False
    mutants = mutants(reference_of("linear_row_moments"))
    mistakes: ClassVar = [({"weight": torch.ones(48)}, r"weight must be \[O,K\], found \[48\]")]


def test_a_layer_norm_between_two_linears() -> None:
    """The statistics that one returns and the other consumes make a LayerNorm, on rows whose mean is large too."""
    d = Draw("layer norm")
    x, first, second = d.tokens(2, 9, 48), d.weight(70, 48), d.weight(30, 70)
    bias = d.normal(70) + 50
    out, moments = torch.ops.tinysr.linear_row_moments(x, first, bias)
    found = torch.ops.tinysr.linear(out, second, row_moments=moments, weight_sums=second.sum(1), eps=1e-6)
    expected = F.linear(F.layer_norm(F.linear(x, first, bias), (70,), eps=1e-6), second)
    assert (found - expected).norm() < 1e-12 * 50 * expected.norm()


def test_tanh_and_exact_gelu_are_told_apart() -> None:
    """They differ by less than 5e-4, so only float64 shows which one is computed."""
    x, one = torch.linspace(-4, 4, 65, dtype=torch.float64)[:, None], torch.ones(1, 1, dtype=torch.float64)
    tanh = torch.ops.tinysr.linear(x, one, activation="gelu_tanh")
    exact = torch.ops.tinysr.linear(x, torch.cat([one, one]), activation="geglu") / torch.where(x == 0, 1.0, x)
    assert is_exact(tanh, F.gelu(x, approximate="tanh"))
    assert is_exact(exact, F.gelu(x))
    assert 1e-4 < (tanh - exact).abs().max() < 1e-3


def test_cost_by_hand() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    x, weight = torch.empty(2, 7, 48, **half), torch.empty(60, 48, **half)
    found = Linear(x, weight, activation="geglu").cost()
    assert found.flops == 2 * 14 * 2880
    assert found.bytes == 2 * (672 + 2880 + 14 * 30)
    # A residual repeated over the batch by a stride of zero is in memory once.
    repeated = torch.empty(1, 7, 60, **half).expand(2, 7, 60)
    assert Linear(x, weight, residual=repeated).cost().bytes == 2 * (672 + 2880 + 420 + 840)


def heuristic(k: int, o: int, arch: int, **more: Tensor) -> Config:
    half = {"dtype": torch.float16, "device": "meta"}
    return Linear(torch.empty(2, 1024, k, **half), torch.empty(o, k, **half), **more).heuristic(GPUS[arch])


def test_the_widest_tile_is_for_asynchronous_copies_and_a_plain_epilogue() -> None:
    """128 tiles of 288 features fill an H200 once; elsewhere their accumulators would spill registers."""
    residual = torch.empty(2, 1024, 4608, dtype=torch.float16, device="meta")
    found = heuristic(1536, 4608, 90)
    assert (found.block_m, found.block_n, found.block_n2) == (128, 256, 32)
    assert heuristic(1536, 4608, 80).block_n + heuristic(1536, 4608, 80).block_n2 <= 192
    assert heuristic(1000, 4608, 90).block_n == heuristic(1536, 4608, 90, residual=residual).block_n == 64


def test_few_programs_have_more_loads_under_way() -> None:
    assert (heuristic(480, 480, 90).block_k, heuristic(480, 480, 90).num_stages) == (128, 4)
    assert (heuristic(480, 960, 90).block_k, heuristic(480, 960, 90).num_stages) == (64, 3)
    assert heuristic(490, 480, 90).block_k == 32
