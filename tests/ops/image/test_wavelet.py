"""wavelet_fix against its definition."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import reference_of
from tests.ops.image.color import Both, ColorContract, flagged, unit
from tests.ops.image.test_resize import eager as resized_eagerly
from tests.ops.image.test_resize import oracle as resized
from tests.ops.mathematics import altered, gather
from tinysr_kernels.ops.image.wavelet import WaveletFix

reference = reference_of("wavelet_fix")


def enlarged(style: Tensor, factor: int, pillow: bool = True) -> Tensor:
    return resized(style, factor, pillow=pillow)


def blurred(t: Tensor, dilation: int) -> Tensor:
    """Nine taps of [1,2,1] x [1,2,1] / 16, pixels outside being the nearest inside."""
    h, w = t.shape[2:]
    out = torch.zeros_like(t)
    for i, across in zip((-1, 0, 1), (1, 2, 1), strict=True):
        for j, along in zip((-1, 0, 1), (1, 2, 1), strict=True):
            rows, columns = torch.arange(h) + i * dilation, torch.arange(w) + j * dilation
            out += across * along / 16 * gather(t, rows, columns, border=None)
    return out


def oracle(x: Tensor, style: Tensor, factor: int) -> Both:
    """The decomposition as published: x's five high bands over style's last low band."""
    high, low_x, low_style = torch.zeros_like(x), x.clamp(0, 1), enlarged(unit(style, x.dtype), factor).clamp(0, 1)
    for level in range(5):
        blurred_x = blurred(low_x, 2**level)
        high = high + (low_x - blurred_x)
        low_x, low_style = blurred_x, blurred(low_style, 2**level)
    return flagged((high + low_style).clamp(0, 1), x.shape[0], x.shape[2])


def eager(x: Tensor, style: Tensor, factor: int) -> Both:
    taps = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
    kernel = taps.expand(x.shape[1], 1, 3, 3)
    u = x.clamp(0, 1)
    large = resized_eagerly(unit(style, x.dtype), factor, pillow=True)
    low = large.clamp(0, 1) - u
    for level in range(5):
        padded = F.pad(low, (2**level,) * 4, mode="replicate")
        low = F.conv2d(padded, kernel, groups=x.shape[1], dilation=2**level)
    return flagged((u + low).clamp(0, 1), x.shape[0], x.shape[2])


def levels(first: int, last: int, mode: str = "replicate") -> Callable[..., Both]:
    """The fix with other levels or another border, in float64."""

    def run(x: Tensor, style: Tensor, factor: int) -> Both:
        u = x.double().clamp(0, 1)
        low = enlarged(unit(style, torch.float64), factor).clamp(0, 1) - u
        for level in range(first, last):
            if mode == "replicate":
                low = blurred(low, 2**level)
            else:
                inner = F.pad(low, (2**level,) * 4)
                low = blurred(inner, 2**level)[:, :, 2**level : -(2**level), 2**level : -(2**level)]
        return flagged((u + low).clamp(0, 1).to(x.dtype), x.shape[0], x.shape[2])

    return run


MUTANTS = {
    "four levels": levels(0, 4),
    "six levels": levels(0, 6),
    "dilations doubled": levels(1, 6),
    "zero border": levels(0, 5, "zeros"),
    "details lost": altered(reference, "x", lambda t: blurred(t, 1)),
    "style as it is": lambda x, style, factor: flagged(
        enlarged(unit(style, x.dtype), factor).clamp(0, 1).to(x.dtype), x.shape[0], x.shape[2]
    ),
    "channels shifted": altered(reference, "style", lambda t: t.roll(1, 0)),
    "bytes doubled": altered(reference, "style", lambda t: t // 2 if t.dtype == torch.uint8 else t),
}
MISTAKES = [
    ({"x": torch.ones(3, 8, 12)}, r"x must be \[N,C,H,W\], found \[3, 8, 12\]"),
    ({"style": torch.ones(2, 3, 2, 4)}, r"style must be \[2, 3, 2, 3\], found \[2, 3, 2, 4\]"),
    ({"x": torch.ones(2, 3, 8, 13)}, r"x must be \[2, 3, 8, 12\], found \[2, 3, 8, 13\]"),
    ({"factor": 0}, "factor must be at least 1, found 0"),
    ({"dtype": torch.bool}, "dtype must be floating or torch.uint8, found torch.bool"),
]


class TestWaveletFix(ColorContract):
    op = "wavelet_fix"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """Per element the enlargement's two passes of four taps, five levels of two of three, difference and sum."""
        return arguments["x"].numel() * (2 * 4 * 2 + 5 * 2 * 3 * 2 + 2)


def test_cost_by_hand() -> None:
    x = torch.empty(2, 3, 4, 8, dtype=torch.float16, device="meta")
    style = torch.empty(2, 3, 1, 2, dtype=torch.uint8, device="meta")
    found = WaveletFix(x, style, 4).cost()
    assert (found.flops, found.bytes) == (192 * 78, 2 * 192 + 12 + 2 * 192 + 8)
