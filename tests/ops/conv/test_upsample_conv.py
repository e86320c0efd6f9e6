"""upsample_conv against its docstring's sum, and the folded phases against enlargement and convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import Arguments, Draw
from tests.ops.contract import OperatorContract, is_exact, reference_of
from tests.ops.mathematics import altered, enlarge, epilogue, gather, tap, zeroed
from tinysr_kernels.ops.conv.upsample_conv import UpsampleConv, phase_weights

reference = reference_of("upsample_conv")


def oracle(x: Tensor, phases: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    n, _, h, w = x.shape
    out = torch.full((n, phases.shape[1], 2 * h, 2 * w), torch.nan, dtype=x.dtype)
    for a in range(2):
        for b in range(2):
            out[:, :, a::2, b::2] = sum(
                torch.einsum(
                    "oc,nchw->nohw",
                    phases[2 * a + b, :, :, i, j],
                    gather(x, torch.arange(h) + a + i - 1, torch.arange(w) + b + j - 1),
                )
                for i in range(2)
                for j in range(2)
            )
    return epilogue(out, bias, activation=activation)


def eager(x: Tensor, phases: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """The transposed convolution of stride 2 that the four phases together are."""
    o, c = phases.shape[1:3]
    kernel = torch.zeros(c, o, 4, 4, dtype=x.dtype)
    for a in range(2):
        for b in range(2):
            # Output 2y+a takes x[y+a+i-1] through tap 2y+a+1 - 2(y+a+i-1) = 3-a-2i of a padding-1 transpose.
            for i in range(2):
                for j in range(2):
                    kernel[:, :, 3 - a - 2 * i, 3 - b - 2 * j] = phases[2 * a + b, :, :, i, j].T
    y = F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    return {"none": lambda t: t, "relu": torch.relu, "silu": F.silu}[activation](y)


MUTANTS = {
    "phases in the other order": altered(reference, "phases", lambda t: t[[0, 2, 1, 3]]),
    "phases rotated": altered(reference, "phases", lambda t: t.roll(1, 0)),
    "transposed kernels": altered(reference, "phases", lambda t: t.transpose(3, 4)),
    "flipped kernels": altered(reference, "phases", lambda t: t.flip(3, 4)),
    "dropped tap": altered(reference, "phases", lambda t: zeroed(t, 3, ..., 1, 1)),
    "last channel masked": altered(reference, "phases", lambda t: zeroed(t, slice(None), slice(None), -1)),
    "no bias": altered(reference, "bias", torch.zeros_like),
    "no activation": altered(reference, "activation", lambda _: "none"),
    "shifted border": lambda **a: reference(**{**a, "x": F.pad(a["x"], (0, 0, 1, 0))})[:, :, :-2],
}

MISTAKES = [
    ({"x": torch.ones(48, 3, 5)}, r"x must be \[N,C,H,W\], found \[48, 3, 5\]"),
    ({"phases": torch.ones(30, 48, 3, 3)}, r"phases must be \[4,O,C,2,2\], found \[30, 48, 3, 3\]"),
    (
        {"phases": torch.ones(4, 30, 47, 2, 2)},
        r"phases must be \[4, 30, 48, 2, 2\], found \[4, 30, 47, 2, 2\]",
    ),
    ({"bias": torch.ones(48)}, r"bias must be \[30\], found \[48\]"),
    ({"activation": "tanh"}, r"activation must be one of .*, found 'tanh'"),
]


def counted_flops(arguments: Arguments) -> int:
    """The transposed convolution's own count would include the zeros it reads beyond the border."""
    x, phases = arguments["x"], arguments["phases"]
    return 2 * phases.numel() * x.shape[0] * x.shape[2] * x.shape[3]


class TestUpsampleConv(OperatorContract):
    op = "upsample_conv"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        return counted_flops(arguments)


def test_cost_by_hand() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    found = UpsampleConv(torch.empty(2, 48, 3, 5, **half), torch.empty(4, 30, 48, 2, 2, **half)).cost()
    assert found.flops == 2 * 30 * 16 * 48 * 30
    assert found.bytes == 2 * (1440 + 23040 + 3600)


sizes = st.integers(1, 7)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(1, 3), c=sizes, o=sizes, h=sizes, w=sizes)
def test_phases_are_enlargement_and_convolution(n: int, c: int, o: int, h: int, w: int) -> None:
    d = Draw(f"phases {n} {c} {o} {h} {w}")
    x, weight, bias = d.image(n, c, h, w), d.weight(o, c, 3, 3), d.normal(o)
    result = torch.ops.tinysr.upsample_conv(x, phase_weights(weight), bias)
    library = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    assert is_exact(result, library)
    u = enlarge(x)
    plain = sum(torch.einsum("oc,nchw->nohw", weight[:, :, i, j], tap(u, i, j)) for i in range(3) for j in range(3))
    assert is_exact(result, plain + bias[:, None, None])


def test_phase_weights_of_counted_taps() -> None:
    weight = torch.arange(9.0).view(1, 1, 3, 3)
    top_left, top_right, bottom_left, bottom_right = phase_weights(weight)[:, 0, 0].tolist()
    assert top_left == [[0, 1 + 2], [3 + 6, 4 + 5 + 7 + 8]]
    assert top_right == [[0 + 1, 2], [3 + 4 + 6 + 7, 5 + 8]]
    assert bottom_left == [[0 + 3, 1 + 2 + 4 + 5], [6, 7 + 8]]
    assert bottom_right == [[0 + 1 + 3 + 4, 2 + 5], [6 + 7, 8]]


@pytest.mark.parametrize("shape", [(5, 4, 2, 2), (5, 4, 9)])
def test_phase_weights_of_another_kernel(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight must be"):
        phase_weights(torch.ones(shape))
