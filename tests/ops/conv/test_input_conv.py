"""input_conv against its docstring's sum, and as the PixelUnshuffle convolution it replaces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Draw
from tests.ops.contract import OperatorContract, is_exact, reference_of
from tests.ops.mathematics import altered, gather, zeroed
from tinysr_kernels.ops.conv.input_conv import InputConv

reference = reference_of("input_conv")


def oracle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    border: float = 0.0,
) -> Tensor:
    x = x.to(weight.dtype) / 255 if x.dtype == torch.uint8 else x
    k = weight.shape[2]
    rows = torch.arange(0, x.shape[2] + 2 * padding - k + 1, stride) - padding
    columns = torch.arange(0, x.shape[3] + 2 * padding - k + 1, stride) - padding
    out = sum(
        torch.einsum("oc,nchw->nohw", weight[:, :, i, j], gather(x, rows + i, columns + j, border))
        for i in range(k)
        for j in range(k)
    )
    return out if bias is None else out + bias[None, :, None, None]


def eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 1,
    border: float = 0.0,
) -> Tensor:
    x = x.to(weight.dtype) / 255 if x.dtype == torch.uint8 else x
    return F.conv2d(F.pad(x, (padding,) * 4, value=border), weight, bias, stride=stride)


MUTANTS = {
    "zero border": altered(reference, "border", lambda _: 0.0),
    "dropped tap": altered(reference, "weight", lambda t: zeroed(t, ..., -1, -1)),
    "transposed kernel": altered(reference, "weight", lambda t: t.transpose(2, 3)),
    "colors swapped": altered(reference, "weight", lambda t: t.flip(1)),
    "no bias": altered(reference, "bias", torch.zeros_like),
    "shifted phase": lambda **a: reference(**{**a, "x": a["x"].roll(1, 3)}),
    "border of the nearest pixel": lambda **a: reference(
        **{**a, "x": F.pad(a["x"], (a.get("padding", 1),) * 4, mode="replicate"), "padding": 0}
    ),
}

MISTAKES = [
    ({"x": torch.ones(3, 7, 5)}, r"x must be \[N,C,H,W\], found \[3, 7, 5\]"),
    ({"weight": torch.ones(48, 3, 3)}, r"weight must be \[O,C,K,K\], found \[48, 3, 3\]"),
    ({"weight": torch.ones(48, 3, 3, 2)}, r"weight must be \[48, 3, 3, 3\], found \[48, 3, 3, 2\]"),
    ({"weight": torch.ones(48, 4, 3, 3)}, r"weight must be \[48, 3, 3, 3\], found \[48, 4, 3, 3\]"),
    ({"bias": torch.ones(3)}, r"bias must be \[48\], found \[3\]"),
    ({"stride": 0}, "stride must be at least 1, found 0"),
    ({"padding": -1}, "padding must be at least 0, found -1"),
    ({"weight": torch.ones(48, 3, 9, 9)}, "x must be at least 7 pixels per side, found 7x5"),
]


class TestInputConv(OperatorContract):
    op = "input_conv"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES


@pytest.mark.parametrize("r", [1, 2, 3])
def test_pixel_unshuffle_and_range(r: int) -> None:
    """conv3x3(PixelUnshuffle_r(2u-1)) with zero padding is one convolution of u with a border of 0.5."""
    d = Draw(f"unshuffle {r}")
    u, bias = d.unit(2, 3, 4 * r, 5 * r), d.normal(10)
    weight = d.weight(10, 3 * r * r, 3, 3)
    expected = F.conv2d(F.pixel_unshuffle(2 * u - 1, r), weight, bias, padding=1)
    # Channel c*r*r + i*r + j of the unshuffled image is pixel (i, j) of each r x r block.
    large = weight.view(10, 3, r, r, 3, 3).permute(0, 1, 4, 2, 5, 3).reshape(10, 3, 3 * r, 3 * r)
    result = torch.ops.tinysr.input_conv(u, 2 * large, bias - large.sum((1, 2, 3)), stride=r, padding=r, border=0.5)
    assert is_exact(result, expected)


def test_cost_by_hand() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    x, weight = torch.empty(1, 3, 8, 10, **half), torch.empty(45, 3, 6, 6, **half)
    found = InputConv(x, weight, stride=2, padding=2).cost()
    assert found.flops == 2 * 20 * 45 * 108
    assert found.bytes == 2 * (240 + 4860 + 900)
