"""sepconv against the double sum of its docstring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered, eager_epilogue, enlarge, epilogue, tap, zeroed
from tests.ops.norm.channel_moments import MomentsContract, by_hand, mutants
from tinysr_kernels.ops.conv.sepconv import SepConv

reference = reference_of("sepconv")


def oracle(
    x: Tensor, depthwise: Tensor, pointwise: Tensor, stride: int = 1, upsample: bool = False, **rest: Any
) -> Tensor:
    u = enlarge(x) if upsample else x
    d = sum(depthwise[None, :, i, j, None, None] * tap(u, i, j, stride) for i in range(3) for j in range(3))
    return epilogue(torch.einsum("oc,nchw->nohw", pointwise, d), **rest)


def eager(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    upsample: bool = False,
    **rest: Any,
) -> Tensor:
    u = F.interpolate(x, scale_factor=2, mode="nearest") if upsample else x
    d = F.conv2d(u, depthwise[:, None], stride=stride, padding=1, groups=x.shape[1])
    return eager_epilogue(F.conv2d(d, pointwise[:, :, None, None], bias), **rest)


def bilinear_instead_of_nearest(**a: Any) -> Tensor:
    if not a.pop("upsample", False):
        return reference(**a)
    return reference(**{**a, "x": F.interpolate(a["x"], scale_factor=2, mode="bilinear")})


def stride_from_the_second_pixel(**a: Any) -> Tensor:
    stride = a.pop("stride", 1)
    if stride == 1 or a["x"].shape[2] % 2 or a["x"].shape[3] % 2 or "residual" in a:
        return reference(**a, stride=stride)
    return reference(**a)[:, :, 1::2, 1::2]


MUTANTS = {
    "dropped tap": altered(reference, "depthwise", lambda t: zeroed(t, slice(None), 2, 2)),
    "transposed kernel": altered(reference, "depthwise", lambda t: t.transpose(1, 2)),
    "flipped kernel": altered(reference, "depthwise", lambda t: t.flip(1)),
    "shifted channels": altered(reference, "depthwise", lambda t: t.roll(1, 0)),
    "last channel masked": altered(reference, "pointwise", lambda t: zeroed(t, slice(None), -1)),
    "no bias": altered(reference, "bias", torch.zeros_like),
    "no residual": altered(reference, "residual", torch.zeros_like),
    "residual on the other side": lambda **a: reference(
        **{**a, "activate_residual": not a.get("activate_residual", True)}
    ),
    "no skip": altered(reference, "skip", torch.zeros_like),
    "shortcut columns swapped": altered(reference, "shortcut_weight", lambda t: t.roll(1, 1)),
    "no activation": altered(reference, "activation", lambda _: "none"),
    "bilinear": bilinear_instead_of_nearest,
    "repeated border": lambda **a: (
        reference(**a)
        if {"residual", "shortcut", "upsample", "stride"} & a.keys()
        else reference(**{**a, "x": F.pad(a["x"], (1, 1, 1, 1), mode="replicate")})[:, :, 1:-1, 1:-1]
    ),
}

MISTAKES = [
    ({"x": torch.ones(48, 5)}, r"x must be \[N,C,H,W\], found \[48, 5\]"),
    ({"depthwise": torch.ones(47, 3, 3)}, r"depthwise must be \[48, 3, 3\], found \[47, 3, 3\]"),
    ({"depthwise": torch.ones(48, 9)}, r"depthwise must be \[48, 3, 3\], found \[48, 9\]"),
    ({"pointwise": torch.ones(60, 47)}, r"pointwise must be \[60, 48\], found \[60, 47\]"),
    ({"pointwise": torch.ones(60, 48, 1, 1)}, r"pointwise must be \[O,C\], found \[60, 48, 1, 1\]"),
    ({"bias": torch.ones(1)}, r"bias must be \[60\], found \[1\]"),
    ({"residual": torch.ones(2, 60, 1, 7)}, r"residual must be \[2, 60, 5, 7\], found \[2, 60, 1, 7\]"),
    ({"stride": 3}, r"stride must be one of \(1, 2\), found 3"),
    ({"stride": 2}, r"residual must be \[2, 60, 3, 4\], found \[2, 60, 5, 7\]"),
    ({"upsample": True}, r"residual must be \[2, 60, 10, 14\], found \[2, 60, 5, 7\]"),
    ({"activation": "gelu"}, r"activation must be one of .*'silu'.*, found 'gelu'"),
    ({"shortcut": torch.ones(2, 3, 5, 7)}, r"given together, found only \['shortcut'\]"),
    ({"skip": torch.ones(2, 3, 5, 7)}, r"given together, found only \['skip'\]"),
    (
        {"shortcut": torch.ones(2, 3, 5, 6), "shortcut_weight": torch.ones(60, 3)},
        r"shortcut must be \[2, 3, 5, 7\], found \[2, 3, 5, 6\]",
    ),
    (
        {"shortcut": torch.ones(2, 3, 5, 7), "shortcut_weight": torch.ones(60, 4)},
        r"shortcut_weight must be \[60, 3\], found \[60, 4\]",
    ),
]


class TestSepconv(OperatorContract):
    op = "sepconv"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES


class TestSepconvMoments(MomentsContract):
    op = "sepconv_moments"
    oracle = staticmethod(by_hand(oracle))
    eager = staticmethod(by_hand(eager))
    mutants = mutants(reference_of("sepconv_moments"))
    mistakes = MISTAKES[:2]


@pytest.mark.parametrize(
    ("channels", "outputs", "options", "flops", "moved"),
    [
        # x 2*48*8*6 halves, weights 432 + 48*60, bias 60, result 2*60*8*6
        (48, 60, {}, 2 * 96 * (9 * 48 + 48 * 60), 2 * (4608 + 432 + 2880 + 60 + 5760)),
        # a quarter of the output
        (48, 60, {"stride": 2}, 2 * 24 * (9 * 48 + 48 * 60), 2 * (4608 + 432 + 2880 + 60 + 1440)),
        # four times the output, the input read at its own size
        (3, 10, {"upsample": True}, 2 * 384 * (27 + 30), 2 * (288 + 27 + 30 + 10 + 3840)),
    ],
)
def test_cost_by_hand(channels: int, outputs: int, options: dict, flops: int, moved: int) -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    x = torch.empty(2, channels, 8, 6, **half)
    depthwise, pointwise = torch.empty(channels, 3, 3, **half), torch.empty(outputs, channels, **half)
    found = SepConv(x, depthwise, pointwise, torch.empty(outputs, **half), **options).cost()
    assert (found.flops, found.bytes) == (flops, moved)
