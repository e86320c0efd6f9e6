"""sepconv_block against three times sepconv's double sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.contract import OperatorContract, reference_of
from tests.ops.conv import test_sepconv
from tests.ops.mathematics import altered, zeroed
from tinysr_kernels.ops.conv.sepconv_block import SepConvBlock

reference = reference_of("sepconv_block")
sepconv_reference = reference_of("sepconv")


def three_times(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The block from a function of sepconv's arguments."""

    def block(x: Tensor, **weights: Any) -> Tensor:
        h = x
        for i in (1, 2, 3):
            own = {name: weights[f"{name}{i}"] for name in ("depthwise", "pointwise", "bias")}
            h = convolution(h, **own, activation="relu", **({"residual": x} if i == 3 else {}))
        return h

    return block


def without_skip(x: Tensor, **weights: Any) -> Tensor:
    return three_times(lambda x, residual=None, **rest: sepconv_reference(x, **rest))(x, **weights)


def skip_after_relu(x: Tensor, **weights: Any) -> Tensor:
    return three_times(lambda x, **rest: sepconv_reference(x, activate_residual=False, **rest))(x, **weights)


def exchanged(**a: Any) -> Tensor:
    """The first two convolutions in the other order."""
    swap = {"1": "2", "2": "1"}
    return reference(**{name[:-1] + swap.get(name[-1], name[-1]): value for name, value in a.items()})


class TestSepconvBlock(OperatorContract):
    op = "sepconv_block"
    oracle = staticmethod(three_times(test_sepconv.oracle))
    eager = staticmethod(three_times(test_sepconv.eager))
    same_bits_in_any_batch = False
    mutants = {
        "no skip": without_skip,
        "skip after the ReLU": skip_after_relu,
        "exchanged": exchanged,
        "dropped tap": altered(reference, "depthwise2", lambda t: zeroed(t, slice(None), 0, 1)),
        "transposed kernel": altered(reference, "depthwise3", lambda t: t.transpose(1, 2)),
        "transposed product": altered(reference, "pointwise1", lambda t: t.T),
        "no bias": altered(reference, "bias3", torch.zeros_like),
    }
    mistakes = [
        ({"x": torch.ones(48, 5)}, r"x must be \[N,C,H,W\], found \[48, 5\]"),
        ({"depthwise2": torch.ones(47, 3, 3)}, r"depthwise2 must be \[48, 3, 3\], found \[47, 3, 3\]"),
        ({"pointwise3": torch.ones(60, 48)}, r"pointwise3 must be \[48, 48\], found \[60, 48\]"),
        ({"bias1": torch.ones(1)}, r"bias1 must be \[48\], found \[1\]"),
    ]


def test_cost_by_hand() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    weights = (torch.empty(10, 3, 3, **half), torch.empty(10, 10, **half), torch.empty(10, **half))
    given = (*weights, *(torch.empty_like(w) for w in (*weights, *weights)))
    found = SepConvBlock(torch.empty(2, 10, 8, 6, **half), *given).cost()
    assert (found.flops, found.bytes) == (3 * 2 * 96 * 10 * (9 + 10), 2 * (2 * 960 + 3 * (90 + 100 + 10)))
