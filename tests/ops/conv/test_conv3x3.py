"""conv3x3 against the nine shifted sums of its docstring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered, eager_epilogue, epilogue, tap, zeroed
from tests.ops.norm import test_group_norm
from tests.ops.norm.channel_moments import MomentsContract, by_hand, mutants
from tinysr_kernels.ops.conv.conv3x3 import Conv3x3

reference = reference_of("conv3x3")

NORM = ("norm_moments", "norm_weight", "norm_bias", "norm_groups", "norm_eps")


def normed_by(norm: Any, x: Tensor, rest: Arguments) -> Tensor:
    """x after group_norm (an oracle or eager) if `rest` has one, whose arguments are removed from it."""
    moments, weight, bias, groups, eps = (rest.pop(name, None) for name in NORM)
    return x if moments is None else norm(x=x, weight=weight, bias=bias, groups=groups, eps=eps, moments=moments)


def oracle(x: Tensor, weight: Tensor, stride: int = 1, one_sided: bool = False, **rest: Any) -> Tensor:
    x = normed_by(test_group_norm.oracle, x, rest)
    taps = [(i, j, tap(x, i + one_sided, j + one_sided, stride)) for i in range(3) for j in range(3)]
    v = sum(torch.einsum("oc,nchw->nohw", weight[:, :, i, j], pixels) for i, j, pixels in taps)
    if one_sided:
        v = v[:, :, : x.shape[2] // 2, : x.shape[3] // 2]
    return epilogue(v, **rest)


def eager(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, one_sided: bool = False, **rest: Any
) -> Tensor:
    x = normed_by(test_group_norm.eager, x, rest)
    if one_sided:
        return eager_epilogue(F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=stride), **rest)
    return eager_epilogue(F.conv2d(x, weight, bias, stride=stride, padding=1), **rest)


MUTANTS = {
    "dropped tap": altered(reference, "weight", lambda t: zeroed(t, ..., 0, 2)),
    "transposed kernel": altered(reference, "weight", lambda t: t.transpose(2, 3)),
    "shifted columns": altered(reference, "weight", lambda t: t.roll(1, 3)),
    "shifted outputs": altered(reference, "weight", lambda t: t.roll(1, 0)),
    "last channel masked": altered(reference, "weight", lambda t: zeroed(t, slice(None), -1)),
    "no bias": altered(reference, "bias", torch.zeros_like),
    "bias twice": altered(reference, "bias", lambda t: 2 * t),
    "no residual": altered(reference, "residual", torch.zeros_like),
    "residual on the other side": lambda **a: reference(
        **{**a, "activate_residual": not a.get("activate_residual", True)}
    ),
    "no skip": altered(reference, "skip", torch.zeros_like),
    "shortcut columns swapped": altered(reference, "shortcut_weight", lambda t: t.roll(1, 1)),
    "no activation": altered(reference, "activation", lambda _: "none"),
    "relu for silu": altered(reference, "activation", lambda name: name.replace("silu", "relu")),
    "norm's moments swapped": altered(reference, "norm_moments", lambda t: t.flip(1).abs()),
    "no norm": altered(reference, "norm_moments", lambda t: torch.stack([0 * t[:, 0], 0 * t[:, 1] + 1], 1)),
    "norm's weight shifted": altered(reference, "norm_weight", lambda t: t.roll(1)),
    "no norm's bias": altered(reference, "norm_bias", torch.zeros_like),
    "one group": altered(reference, "norm_groups", lambda _: 1),
    "no eps": altered(reference, "norm_eps", lambda _: 0.0),
    "padding on both sides": lambda **a: (
        reference(**{**a, "x": F.pad(a["x"], (1, 0, 1, 0))[:, :, :-1, :-1]}) if "one_sided" in a else reference(**a)
    ),
    "wrong border": lambda **a: (
        reference(**a)
        if {"residual", "shortcut", "stride", "norm_moments"} & a.keys()
        else reference(**{**a, "x": F.pad(a["x"], (1, 1, 1, 1), value=1.0)})[:, :, 1:-1, 1:-1]
    ),
}

MISTAKES = [
    ({"x": torch.ones(48, 5)}, r"x must be \[N,C,H,W\], found \[48, 5\]"),
    ({"weight": torch.ones(60, 47, 3, 3)}, r"weight must be \[60, 48, 3, 3\], found \[60, 47, 3, 3\]"),
    ({"weight": torch.ones(60, 48, 1, 1)}, r"weight must be \[60, 48, 3, 3\], found \[60, 48, 1, 1\]"),
    ({"weight": torch.ones(60, 48)}, r"weight must be \[O,C,3,3\], found \[60, 48\]"),
    ({"bias": torch.ones(48)}, r"bias must be \[60\], found \[48\]"),
    ({"residual": torch.ones(1, 60, 5, 7)}, r"residual must be \[2, 60, 5, 7\], found \[1, 60, 5, 7\]"),
    ({"stride": 0}, r"stride must be one of \(1, 2\), found 0"),
    ({"activation": "SiLU"}, r"activation must be one of .*'silu'.*, found 'SiLU'"),
    ({"shortcut_weight": torch.ones(60, 3)}, r"given together, found only \['shortcut_weight'\]"),
    (
        {"shortcut": torch.ones(2, 3, 5, 7), "skip": torch.ones(2, 1, 7), "shortcut_weight": torch.ones(60, 4)},
        r"skip must be \[N,C,H,W\], found \[2, 1, 7\]",
    ),
    ({"norm_weight": torch.ones(48)}, r"given together, found only \['norm_weight'\]"),
    (
        {"norm_moments": torch.ones(2, 48), "norm_weight": torch.ones(48), "norm_bias": torch.ones(48)},
        r"norm_moments must be \[2, 2, 48\], found \[2, 48\]",
    ),
    ({"one_sided": True}, "one_sided needs stride 2, found 1"),
    ({"x": torch.ones(2, 48, 1, 7), "stride": 2, "one_sided": True, "residual": None}, "2 pixels per side, found"),
    ({"norm_groups": 7}, "norm_groups must divide 48 channels, found 7"),
]


def norm_flops(arguments: Arguments) -> int:
    """Of a norm prologue: 2 for the map and 4 for SiLU, per element."""
    return 6 * arguments["x"].numel() if "norm_moments" in arguments else 0


class TestConv3x3(OperatorContract):
    op = "conv3x3"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        return super().counted_flops(arguments) + norm_flops(arguments)


class TestConv3x3Moments(MomentsContract):
    op = "conv3x3_moments"
    oracle = staticmethod(by_hand(oracle))
    eager = staticmethod(by_hand(eager))
    mutants = mutants(reference_of("conv3x3_moments"))
    mistakes = MISTAKES[:2]


def test_cost_by_hand() -> None:
    half = {"dtype": torch.bfloat16, "device": "meta"}
    x, weight = torch.empty(1, 64, 8, 6, **half), torch.empty(32, 64, 3, 3, **half)
    found = Conv3x3(x, weight, stride=2).cost()
    assert found.flops == 2 * 12 * 32 * 576
    assert found.bytes == 2 * (3072 + 18432 + 384)
    # A residual that is the input itself is read once; the shortcut extends the reduction.
    square = torch.empty(64, 64, 3, 3, **half)
    assert Conv3x3(x, square, residual=x).cost().bytes == 2 * (3072 + 36864 + 3072)
    found = Conv3x3(x, square, shortcut=x, shortcut_weight=torch.empty(64, 64, **half)).cost()
    assert found.flops == 2 * 48 * 64 * 640
    assert found.bytes == 2 * (3072 + 36864 + 4096 + 3072)


@pytest.mark.parametrize("activate", [False, True])
def test_negative_values_show_where_the_residual_goes(activate: bool) -> None:
    x, weight = torch.full((1, 1, 1, 1), -2.0), torch.zeros(1, 1, 3, 3)
    out = torch.ops.tinysr.conv3x3(x, weight, None, x, activation="relu", activate_residual=activate)
    assert out.item() == (0.0 if activate else -2.0)
