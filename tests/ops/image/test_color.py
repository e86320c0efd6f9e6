"""adain_fix, wavelet_fix and clamp_image against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import CASES, Arguments, Case, Draw
from tests.ops.contract import OperatorContract, errors, is_exact
from tests.ops.image.test_resize import oracle as enlarged
from tests.ops.mathematics import altered, gather
from tinysr_kernels.ops.image.color import (
    adain_cost,
    adain_reference,
    clamp_cost,
    clamp_reference,
    wavelet_cost,
    wavelet_reference,
)

Both = tuple[Tensor, Tensor]


def unit(style: Tensor, dtype: torch.dtype) -> Tensor:
    """An image in [0,1], of bytes too."""
    return style.to(dtype) / 255 if style.dtype == torch.uint8 else style


def flagged(out: Tensor, *shape: int) -> Both:
    """The result of an image that is finite."""
    return out, torch.ones(shape, dtype=torch.float64)


def change(function: Callable[..., Both], edit: Callable[[Tensor], Tensor]) -> Callable[..., Both]:
    """`function` with its image edited: a deliberate mistake."""

    def run(**arguments: Any) -> Both:
        out, finite = function(**arguments)
        return edit(out), finite

    return run


class ColorContract(OperatorContract):
    """What the color fixes have in common: flags beside the image, and bytes."""

    def result_dtypes(self, dtype: torch.dtype, number: int) -> list[torch.dtype]:
        return [dtype, torch.bool]

    def check_bytes(self, call: Callable[[Arguments], Any]) -> None:
        """Bytes are the nearest to the exact value, but where that is as near to the middle as float32 can err.

        Which is what the worst element of a float32 result may err (bounds.py).
        """
        for case in CASES[self.op]:
            arguments = case.arguments(torch.float32)
            exact = self.exact(case, torch.float32)[0]
            slack = self.allowed(case, torch.float32)[1] * exact.abs().max()
            found, finite = call({**arguments, "dtype": torch.uint8})
            assert found.dtype == torch.uint8
            assert (found.double() - 255 * exact).abs().max() <= 0.5 + 255 * slack
            assert finite.all()

    def check_flags(self, call: Callable[[Arguments], Any]) -> None:
        """A value that is not finite shows in its own sample, and row, wherever it stands."""
        cases = [case for case in CASES[self.op] if case.arguments(torch.float32)["x"].shape[0] > 1]
        for case in cases[:2]:
            arguments = case.arguments(torch.float16)
            x = arguments["x"]
            height, width = x.shape[2:]
            clean, flags = call(arguments)
            places = ((0, 0), (height // 2, width // 2), (height - 1, width - 1))
            for value, (row, column) in zip((float("inf"), float("nan"), -float("inf")), places, strict=True):
                wrong = x.clone()
                wrong[1, -1, row, column] = value
                out, finite = call({**arguments, "x": wrong})
                expected = torch.ones_like(flags)
                expected[(1, row)[: flags.dim()]] = False
                assert torch.equal(finite, expected), (value, row, column)
                assert torch.equal(out[0], clean[0])

    def test_bytes(self) -> None:
        self.check_bytes(self.call)

    def test_flags(self) -> None:
        self.check_flags(self.call)


def adain_oracle(x: Tensor, style: Tensor, eps: float, least: float, clamp: bool = False) -> Both:
    def moments(t: Tensor) -> Both:
        count = t.shape[2] * t.shape[3]
        mean = t.sum((2, 3), keepdim=True) / count
        return mean, ((t - mean) ** 2).sum((2, 3), keepdim=True) / max(1, count - 1)

    x = torch.minimum(torch.maximum(x, torch.zeros_like(x)), torch.ones_like(x)) if clamp else x
    (mean, variance), (wanted, wanted_variance) = moments(x), moments(unit(style, torch.float64))
    deviation = torch.maximum((variance + eps) ** 0.5, torch.tensor(least, dtype=torch.float64))
    out = (x - mean) / deviation * (wanted_variance + eps) ** 0.5 + wanted
    return flagged(torch.minimum(torch.maximum(out, torch.zeros_like(out)), torch.ones_like(out)), x.shape[0])


def adain_eager(x: Tensor, style: Tensor, eps: float, least: float, clamp: bool = False) -> Both:
    """As the public code has it, with statistics of one pixel that are not NaN."""
    x = x.clamp(0, 1) if clamp else x
    style = unit(style, x.dtype)
    stats = []
    for t in (x, style):
        variance, mean = torch.var_mean(t, (2, 3), keepdim=True, correction=min(1, t.shape[2] * t.shape[3] - 1))
        stats.append((mean, (variance + eps).sqrt()))
    (mean, deviation), (wanted, wanted_deviation) = stats
    out = (x - mean) / deviation.clamp(min=least) * wanted_deviation + wanted
    return flagged(out.clamp(0, 1), x.shape[0])


ADAIN_MUTANTS = {
    "no clamp": altered(adain_reference, "clamp", lambda _: False),
    "no eps": lambda eps, least, **a: adain_reference(**a, eps=eps / 2, least=max(least, 1e-9)),
    "no least": lambda least, eps, **a: adain_reference(**a, eps=eps + 1e-12, least=0.0),
    "style's mean lost": change(adain_reference, lambda t: t * 0.9),
    "channels shifted": altered(adain_reference, "style", lambda t: t.roll(1, 1)),
    "samples shifted": altered(adain_reference, "style", lambda t: t.roll(1, 0)),
    "last column left out": altered(adain_reference, "style", lambda t: t[..., :-1] if t.shape[3] > 1 else t),
    "over all channels": altered(
        adain_reference, "style", lambda t: t.transpose(1, 2).flatten(2)[:, None].expand(-1, t.shape[1], -1, -1)
    ),
    "flags swapped": lambda **a: (adain_reference(**a)[0], ~adain_reference(**a)[1]),
}
ADAIN_MISTAKES = [
    ({"x": torch.ones(3, 5, 7)}, r"x must be \[N,C,H,W\], found \[3, 5, 7\]"),
    ({"style": torch.ones(3, 5)}, r"style must be \[N,C,h,w\], found \[3, 5\]"),
    ({"style": torch.ones(2, 1, 5, 4)}, r"style must be \[2, 3, 5, 4\], found \[2, 1, 5, 4\]"),
    ({"eps": 0.0}, "eps or least must be positive, found 0.0 and 0.0"),
    ({"dtype": torch.int32}, "dtype must be floating or torch.uint8, found torch.int32"),
]


class TestAdainFix(ColorContract):
    op = "adain_fix"
    oracle = staticmethod(adain_oracle)
    eager = staticmethod(adain_eager)
    mutants = ADAIN_MUTANTS
    mistakes = ADAIN_MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """4 per element of both images for the moments, 3 of x for the map."""
        return 7 * arguments["x"].numel() + 4 * arguments["style"].numel()


def blurred(t: Tensor, dilation: int) -> Tensor:
    """Nine taps of [1,2,1] x [1,2,1] / 16, pixels outside being the nearest inside."""
    h, w = t.shape[2:]
    out = torch.zeros_like(t)
    for i, across in zip((-1, 0, 1), (1, 2, 1), strict=True):
        for j, along in zip((-1, 0, 1), (1, 2, 1), strict=True):
            rows, columns = torch.arange(h) + i * dilation, torch.arange(w) + j * dilation
            out += across * along / 16 * gather(t, rows, columns, border=None)
    return out


def wavelet_oracle(x: Tensor, style: Tensor, factor: int) -> Both:
    """The decomposition as published: x's five high bands over style's last low band."""
    high, low_x, low_style = torch.zeros_like(x), x.clamp(0, 1), enlarged(unit(style, x.dtype), factor).clamp(0, 1)
    for level in range(5):
        blurred_x = blurred(low_x, 2**level)
        high = high + (low_x - blurred_x)
        low_x, low_style = blurred_x, blurred(low_style, 2**level)
    return flagged((high + low_style).clamp(0, 1), x.shape[0], x.shape[2])


def wavelet_eager(x: Tensor, style: Tensor, factor: int) -> Both:
    taps = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
    kernel = taps.expand(x.shape[1], 1, 3, 3)
    u = x.clamp(0, 1)
    large = F.interpolate(unit(style, x.dtype), scale_factor=factor, mode="bicubic", align_corners=False)
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


WAVELET_MUTANTS = {
    "four levels": levels(0, 4),
    "six levels": levels(0, 6),
    "dilations doubled": levels(1, 6),
    "zero border": levels(0, 5, "zeros"),
    "details lost": altered(wavelet_reference, "x", lambda t: blurred(t, 1)),
    "style as it is": lambda x, style, factor: flagged(
        enlarged(unit(style, x.dtype), factor).clamp(0, 1).to(x.dtype), x.shape[0], x.shape[2]
    ),
    "channels shifted": altered(wavelet_reference, "style", lambda t: t.roll(1, 0)),
    "bytes doubled": altered(wavelet_reference, "style", lambda t: t // 2 if t.dtype == torch.uint8 else t),
}
WAVELET_MISTAKES = [
    ({"x": torch.ones(3, 8, 12)}, r"x must be \[N,C,H,W\], found \[3, 8, 12\]"),
    ({"style": torch.ones(2, 3, 2, 4)}, r"style must be \[2, 3, 2, 3\], found \[2, 3, 2, 4\]"),
    ({"x": torch.ones(2, 3, 8, 13)}, r"x must be \[2, 3, 8, 12\], found \[2, 3, 8, 13\]"),
    ({"factor": 0}, "factor must be at least 1, found 0"),
    ({"dtype": torch.bool}, "dtype must be floating or torch.uint8, found torch.bool"),
]


class TestWaveletFix(ColorContract):
    op = "wavelet_fix"
    oracle = staticmethod(wavelet_oracle)
    eager = staticmethod(wavelet_eager)
    same_bits_in_any_batch = False
    mutants = WAVELET_MUTANTS
    mistakes = WAVELET_MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """Per element the enlargement's two passes of four taps, five levels of two of three, difference and sum."""
        return arguments["x"].numel() * (2 * 4 * 2 + 5 * 2 * 3 * 2 + 2)


def clamp_oracle(x: Tensor) -> Both:
    out = torch.minimum(torch.maximum(x, torch.zeros_like(x)), torch.ones_like(x))
    return flagged(out, x.shape[0], x.shape[2])


class TestClampImage(ColorContract):
    op = "clamp_image"
    oracle = staticmethod(clamp_oracle)
    eager = staticmethod(lambda x: flagged(x.clamp(0, 1), x.shape[0], x.shape[2]))
    mutants: Any = {
        "not clamped below": lambda x: flagged(x.clamp(max=1), x.shape[0], x.shape[2]),
        "not clamped above": lambda x: flagged(x.clamp(min=0), x.shape[0], x.shape[2]),
        "shifted": altered(clamp_reference, "x", lambda t: t.roll(1, 3)),
    }
    mistakes: Any = [
        ({"x": torch.ones(3, 5)}, r"x must be \[N,C,H,W\], found \[3, 5\]"),
        ({"dtype": torch.int64}, "dtype must be floating or torch.uint8, found torch.int64"),
    ]

    def counted_flops(self, arguments: Arguments) -> int:
        """None."""
        return 0


# Images whose means are 50 deviations from zero.
FAR_FROM_ZERO = Case(
    "adain_fix",
    "far from zero",
    lambda d: {
        "x": d.unit(2, 3, 33, 17) * 0.01 + 0.5,
        "style": d.unit(2, 3, 12, 11) * 0.01 + 0.5,
        "eps": 0.0,
        "least": 1e-4,
    },
)


def test_statistics_far_from_zero() -> None:
    """A variance as a difference of squares would spoil the image: at least 5 times worse in float32."""
    arguments, exact = FAR_FROM_ZERO.arguments(torch.float32), TestAdainFix.exact(FAR_FROM_ZERO, torch.float32)[0]
    x, style = arguments["x"], arguments["style"]
    gain = ((style.square().mean((2, 3)) - style.mean((2, 3)).square()) * 132 / 131).sqrt()
    gain /= ((x.square().mean((2, 3)) - x.mean((2, 3)).square()) * 561 / 560).sqrt()
    naive = (x - x.mean((2, 3), keepdim=True)) * gain[..., None, None] + style.mean((2, 3), keepdim=True)
    assert errors(naive, exact)[0] > 5 * errors(adain_reference(**arguments)[0], exact)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fixed_image_has_the_wanted_colors(dtype: torch.dtype) -> None:
    """Mean and variance of the result are the style's, where nothing is clamped."""
    d = Draw("adain")
    x, style = d.unit(2, 3, 9, 7) * 0.2 + 0.4, d.unit(2, 3, 5, 4) * 0.3 + 0.3
    fixed, _ = torch.ops.tinysr.adain_fix(x.to(dtype), style, 0.0, 1e-6, False, torch.float64)
    for moment in (torch.mean, torch.var):
        found, wanted = moment(fixed, (2, 3)), moment(style, (2, 3))
        assert is_exact(found, wanted) or dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_costs_by_hand() -> None:
    x = torch.empty(2, 3, 4, 8, dtype=torch.float16, device="meta")
    style = torch.empty(2, 3, 1, 2, dtype=torch.uint8, device="meta")
    found = adain_cost(x, style, 0.0, 1.0, dtype=torch.uint8)
    assert (found.flops, found.bytes) == (7 * 192 + 4 * 12, 2 * 192 + 12 + 192 + 2)
    found = wavelet_cost(x, style, 4)
    assert (found.flops, found.bytes) == (192 * 78, 2 * 192 + 12 + 2 * 192 + 8)
    found = clamp_cost(x, dtype=torch.uint8)
    assert (found.flops, found.bytes) == (0, 2 * 192 + 192 + 8)
