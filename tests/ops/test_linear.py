"""linear against sums over single features."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.contract import OperatorContract, is_exact
from tests.ops.mathematics import altered, zeroed
from tinysr_kernels.ops.linear import cost, reference


def product(x: Tensor, weight: Tensor) -> Tensor:
    return (x[..., None, :] * weight).sum(-1)


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Tensor:
    v = product(x, weight)
    if x2 is not None:
        v = v + product(x2, weight2)
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


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    activation: str = "none",
    x2: Tensor | None = None,
    weight2: Tensor | None = None,
) -> Tensor:
    v = F.linear(x, weight, bias)
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
}

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
]


class TestLinear(OperatorContract):
    op = "linear"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    channels_last = False
    same_bits_in_any_batch = False
    # The library's product with a single vector sums in an order that depends on the vector's alignment.
    same_bits_at_any_address = False
    mutants = MUTANTS
    mistakes = MISTAKES


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
    found = cost(x, weight, activation="geglu")
    assert found.flops == 2 * 14 * 2880
    assert found.bytes == 2 * (672 + 2880 + 14 * 30)
    # A residual repeated over the batch by a stride of zero is in memory once.
    repeated = torch.empty(1, 7, 60, **half).expand(2, 7, 60)
    assert cost(x, weight, residual=repeated).bytes == 2 * (672 + 2880 + 420 + 840)
