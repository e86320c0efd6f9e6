"""linear_fp8 and linear_fp8_quantized against sums over single features, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import OperatorContract, reference_of
from tests.ops.linear.test_quantize import QuantizedContract, nearest
from tests.ops.mathematics import altered, zeroed
from tinysr_kernels.ops.linear.linear_fp8 import LinearFp8, LinearFp8Quantized, out_group

reference = reference_of("linear_fp8")

E4M3 = torch.float8_e4m3fn


def spread(scale: Tensor, width: int) -> Tensor:
    """One scale per element, of `width` elements."""
    return scale.repeat_interleave(width // scale.shape[-1], -1)


def values(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    rows = x.double() * spread(x_scale, x.shape[-1])
    v = (rows[..., None, :] * (weight.double() * weight_scale[:, None])).sum(-1)
    if bias is not None:
        v = v + bias
    if activation == "gelu_tanh":
        v = v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
    return v


def oracle(residual: Tensor | None = None, **a: Any) -> Tensor:
    v = values(**a)
    return v if residual is None else v + residual


def quantized_oracle(**a: Any) -> tuple[Tensor, Tensor]:
    v = values(**a)
    return nearest(v, v.shape[-1] // out_group(v.shape[-1]))


def eager(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    rows = x.to(dtype) * spread(x_scale, x.shape[-1])
    v = F.linear(rows, weight.to(dtype) * weight_scale[:, None], bias)
    if activation == "gelu_tanh":
        v = F.gelu(v, approximate="tanh")
    return v if residual is None else residual + v


def quantized_eager(**a: Any) -> tuple[Tensor, Tensor]:
    """In the dtype itself throughout."""
    v = eager(**a)
    parts = v.unflatten(-1, (-1, out_group(v.shape[-1])))
    scale = parts.abs().amax(-1) / 448
    return (parts / scale[..., None]).clamp(-448, 448).flatten(-2).to(E4M3), scale


def without_activation(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **a: function(**{**a, "activation": "none"})


def mutants(function: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return {
        "no bias": altered(function, "bias", torch.zeros_like),
        "no activation": without_activation(function),
        "features masked": altered(function, "weight", lambda t: zeroed(t.double(), slice(None), -1).to(E4M3)),
        "rows shifted": altered(function, "weight", lambda t: t.double().roll(1, 0).to(E4M3)),
        "scales of the next channel": altered(function, "weight_scale", lambda t: t.roll(1, 0)),
        "one scale for all groups": altered(function, "x_scale", lambda t: t[..., :1].expand(t.shape)),
        "the first row's scale": altered(
            function,
            "x_scale",
            lambda t: t.reshape(-1, t.shape[-1])[:1].expand(t.numel() // t.shape[-1], -1).view(t.shape),
        ),
    }


X = torch.ones(2, 7, 96).to(E4M3)
MISTAKES: list[tuple[Arguments, str]] = [
    ({"x": torch.ones(()).to(E4M3)}, r"x must be \[...,K\], found \[\]"),
    ({"x": X.float()}, "x must be of torch.float8_e4m3fn, found torch.float32"),
    ({"weight": torch.ones(48, 96)}, "weight must be of torch.float8_e4m3fn, found torch.float32"),
    ({"weight": torch.ones(96).to(E4M3)}, r"weight must be \[O,K\], found \[96\]"),
    ({"weight": torch.ones(48, 95).to(E4M3)}, r"weight must be \[48, 96\], found \[48, 95\]"),
    ({"x": X[..., :80], "weight": X[0, :1, :80].expand(48, 80)}, "must be a multiple of 32 deep, found 80"),
    ({"x_scale": torch.ones(())}, r"x_scale must be \[...,S\], found \[\]"),
    ({"x_scale": torch.ones(2, 1, 1)}, r"x_scale must be \[2, 7, 1\], found \[2, 1, 1\]"),
    ({"x_scale": torch.ones(2, 7, 2)}, "groups of a multiple of 32 of 96 elements, found 2 groups"),
    ({"weight_scale": torch.ones(1)}, r"weight_scale must be \[48\], found \[1\]"),
    ({"bias": torch.ones(1)}, r"bias must be \[48\], found \[1\]"),
    ({"activation": "geglu"}, r"activation must be one of .*'gelu_tanh'.*, found 'geglu'"),
    ({"dtype": torch.int32}, "dtype must be floating, of 16 bits or more, found torch.int32"),
    ({"dtype": E4M3}, "dtype must be floating, of 16 bits or more, found torch.float8_e4m3fn"),
]


class TestLinearFp8(OperatorContract):
    op = "linear_fp8"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    channels_last = False
    same_bits_in_any_batch = False
    same_bits_at_any_address = False
    mutants = mutants(reference) | {"no residual": altered(reference, "residual", torch.zeros_like)}
    mistakes = [*MISTAKES, ({"residual": torch.ones(2, 1, 48)}, r"residual must be \[2, 7, 48\], found \[2, 1, 48\]")]


class TestLinearFp8Quantized(QuantizedContract):
    op = "linear_fp8_quantized"
    oracle = staticmethod(quantized_oracle)
    eager = staticmethod(quantized_eager)
    same_bits_in_any_batch = False
    same_bits_at_any_address = False
    mutants = mutants(reference_of("linear_fp8_quantized"))
    mistakes = [
        (
            {"weight": torch.ones(48, 96).to(E4M3), "weight_scale": torch.ones(48), "bias": None},
            "a multiple of 32 rows",
        ),
        ({"bias": torch.ones(1)}, r"bias must be \[160\], found \[1\]"),
    ]

    def counted_flops(self, arguments: Arguments) -> int:
        """Those of the matmul; quantizing its result is its epilogue."""
        return 2 * arguments["x"].numel() * arguments["weight"].shape[0]


@pytest.mark.parametrize(("features", "group"), [(6144, 128), (192, 64), (96, 32), (48, 0), (160, 32)])
def test_groups_of_features(features: int, group: int) -> None:
    assert out_group(features) == group


def test_cost_by_hand() -> None:
    meta = {"device": "meta"}
    x, weight = (torch.empty(*shape, dtype=E4M3, **meta) for shape in ((2, 7, 64), (256, 64)))
    x_scale, weight_scale = torch.empty(2, 7, 1, **meta), torch.empty(256, **meta)
    residual = torch.empty(2, 7, 256, dtype=torch.float16, **meta)
    found = LinearFp8(x, x_scale, weight, weight_scale, torch.float16, residual=residual).cost()
    assert found.flops == 2 * 14 * 64 * 256
    assert found.bytes == 14 * 64 + 4 * 14 + 64 * 256 + 4 * 256 + 2 * 2 * 14 * 256
    found = LinearFp8Quantized(x, x_scale, weight, weight_scale, torch.float16).cost()
    assert found.bytes == 14 * 64 + 4 * 14 + 64 * 256 + 4 * 256 + 14 * 256 + 4 * 14 * 2
