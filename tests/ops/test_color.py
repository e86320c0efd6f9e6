"""channel_stats, affine_clamp and wavelet_fix against their definitions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments, Draw
from tests.ops.contract import OperatorContract, errors, is_exact
from tests.ops.mathematics import altered, gather
from tinysr_kernels.ops.color import (
    affine_cost,
    affine_reference,
    stats_cost,
    stats_reference,
    wavelet_cost,
    wavelet_reference,
)
from tinysr_kernels.ops.registry import wide


def stats_oracle(x: Tensor) -> tuple[Tensor, Tensor]:
    count = x.shape[2] * x.shape[3]
    mean = x.sum((2, 3)) / count
    return mean, ((x - mean[:, :, None, None]) ** 2).sum((2, 3)) / max(1, count - 1)


def stats_eager(x: Tensor) -> tuple[Tensor, Tensor]:
    """In float32 for half precision too, as the results are."""
    single = x.to(wide(x.dtype))
    variance, mean = torch.var_mean(single, (2, 3), correction=min(1, x.shape[2] * x.shape[3] - 1))
    return mean, variance


STATS_MUTANTS = {
    "biased variance": lambda x: (x.double().mean((2, 3)), x.double().var((2, 3), correction=0)),
    "deviation": lambda x: (stats_reference(x)[0], stats_reference(x)[1].sqrt()),
    "results swapped": lambda x: stats_reference(x)[::-1],
    "last column left out": lambda x: stats_reference(x[..., :-1] if x.shape[3] > 1 else x),
    "channels shifted": lambda x: stats_reference(x.roll(1, 1)),
    "over the batch": lambda x: tuple(
        s.expand(x.shape[:2]) for s in stats_reference(x.transpose(0, 1).flatten(1, 2)[None])
    ),
}


class TestChannelStats(OperatorContract):
    op = "channel_stats"
    oracle = staticmethod(stats_oracle)
    eager = staticmethod(stats_eager)
    channels_last = False
    mutants = STATS_MUTANTS
    mistakes = [({"x": torch.ones(3, 5)}, r"x must be \[N,C,H,W\], found \[3, 5\]")]

    def result_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return wide(dtype)

    def counted_flops(self, arguments: Arguments) -> int:
        """4 per element."""
        return 4 * arguments["x"].numel()


def affine_oracle(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    y = torch.einsum("nchw,nc->nchw", x, gain) + offset[..., None, None]
    return torch.minimum(torch.maximum(y, torch.zeros_like(y)), torch.ones_like(y))


def affine_eager(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    return (x * gain[:, :, None, None] + offset[:, :, None, None]).clamp(0, 1)


AFFINE_MUTANTS = {
    "not clamped": lambda x, gain, offset: x * gain[:, :, None, None] + offset[:, :, None, None],
    "clamped before the offset": lambda x, gain, offset: (
        (x * gain[:, :, None, None]).clamp(0, 1) + offset[:, :, None, None]
    ),
    "no offset": altered(affine_reference, "offset", torch.zeros_like),
    "no gain": altered(affine_reference, "gain", torch.ones_like),
    "channels shifted": altered(affine_reference, "gain", lambda t: t.roll(1, 1)),
    "first sample's gain": altered(affine_reference, "gain", lambda t: t[:1].expand_as(t)),
}
AFFINE_MISTAKES = [
    ({"x": torch.ones(2, 3, 5)}, r"x must be \[N,C,H,W\], found \[2, 3, 5\]"),
    ({"gain": torch.ones(1, 3)}, r"gain must be \[2, 3\], found \[1, 3\]"),
    ({"offset": torch.ones(2, 3, 1, 1)}, r"offset must be \[2, 3\], found \[2, 3, 1, 1\]"),
]


class TestAffineClamp(OperatorContract):
    op = "affine_clamp"
    oracle = staticmethod(affine_oracle)
    eager = staticmethod(affine_eager)
    mutants = AFFINE_MUTANTS
    mistakes = AFFINE_MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """2 per element."""
        return 2 * arguments["x"].numel()


def blurred(t: Tensor, dilation: int) -> Tensor:
    """Nine taps of [1,2,1] x [1,2,1] / 16, pixels outside being the nearest inside."""
    h, w = t.shape[2:]
    out = torch.zeros_like(t)
    for i, across in zip((-1, 0, 1), (1, 2, 1), strict=True):
        for j, along in zip((-1, 0, 1), (1, 2, 1), strict=True):
            rows, columns = torch.arange(h) + i * dilation, torch.arange(w) + j * dilation
            out += across * along / 16 * gather(t, rows, columns, border=None)
    return out


def wavelet_oracle(x: Tensor, style: Tensor) -> Tensor:
    """The decomposition as published: x's five high bands over style's last low band."""
    high, low_x, low_style = torch.zeros_like(x), x, style
    for level in range(5):
        blurred_x = blurred(low_x, 2**level)
        high = high + (low_x - blurred_x)
        low_x, low_style = blurred_x, blurred(low_style, 2**level)
    return (high + low_style).clamp(0, 1)


def wavelet_eager(x: Tensor, style: Tensor) -> Tensor:
    taps = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]], dtype=x.dtype) / 16
    kernel = taps.expand(x.shape[1], 1, 3, 3)
    low = style - x
    for level in range(5):
        padded = F.pad(low, (2**level,) * 4, mode="replicate")
        low = F.conv2d(padded, kernel, groups=x.shape[1], dilation=2**level)
    return (x + low).clamp(0, 1)


def levels(first: int, last: int, mode: str = "replicate") -> object:
    """The fix with other levels or another border, in float64."""

    def run(x: Tensor, style: Tensor) -> Tensor:
        low = (style - x).double()
        for level in range(first, last):
            if mode == "replicate":
                low = blurred(low, 2**level)
            else:
                inner = F.pad(low, (2**level,) * 4)
                low = blurred(inner, 2**level)[:, :, 2**level : -(2**level), 2**level : -(2**level)]
        return (x + low).clamp(0, 1).to(x.dtype)

    return run


WAVELET_MUTANTS = {
    "four levels": levels(0, 4),
    "six levels": levels(0, 6),
    "dilations doubled": levels(1, 6),
    "zero border": levels(0, 5, "zeros"),
    "arguments swapped": lambda x, style: wavelet_reference(style, x),
    "style as it is": lambda x, style: style,
    "not clamped": lambda x, style: x + (wavelet_reference(x / 4 + 0.4, style / 4 + 0.4) - 0.4 - x / 4) * 4,
    "channels shifted": altered(wavelet_reference, "style", lambda t: t.roll(1, 0)),
}
WAVELET_MISTAKES = [
    ({"x": torch.ones(3, 9, 13)}, r"x must be \[N,C,H,W\], found \[3, 9, 13\]"),
    ({"style": torch.ones(2, 3, 9, 12)}, r"style must be \[2, 3, 9, 13\], found \[2, 3, 9, 12\]"),
]


class TestWaveletFix(OperatorContract):
    op = "wavelet_fix"
    oracle = staticmethod(wavelet_oracle)
    eager = staticmethod(wavelet_eager)
    same_bits_in_any_batch = False
    mutants = WAVELET_MUTANTS
    mistakes = WAVELET_MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """Per element five levels of two passes of three taps, a difference and a sum."""
        return arguments["x"].numel() * (5 * 2 * 3 * 2 + 2)


def test_variance_far_from_zero() -> None:
    """At a mean of 50 deviations a variance as a difference of squares is 100 times worse in float32."""
    x = (Draw("far mean").normal(2, 3, 33, 17) + 50).float()
    exact = stats_oracle(x.double())[1]
    difference = (x.square().mean((2, 3)) - x.mean((2, 3)).square()) * 561 / 560
    assert errors(difference, exact)[0] > 100 * errors(stats_reference(x)[1], exact)[0]


def test_affine_of_stats_gives_the_wanted_colours() -> None:
    """The use the two are made for: after the fix, means and variances are the style's."""
    d = Draw("adain")
    x, style = d.unit(2, 3, 9, 7) * 0.2 + 0.4, d.unit(2, 3, 5, 4) * 0.3 + 0.3
    mean, variance = torch.ops.tinysr.channel_stats(x)
    wanted_mean, wanted_variance = torch.ops.tinysr.channel_stats(style)
    gain = (wanted_variance / variance).sqrt()
    fixed = torch.ops.tinysr.affine_clamp(x, gain, wanted_mean - gain * mean)
    assert is_exact(torch.ops.tinysr.channel_stats(fixed), (wanted_mean, wanted_variance))


def test_costs_by_hand() -> None:
    x = torch.empty(2, 3, 5, 7, dtype=torch.float16, device="meta")
    numbers = torch.empty(2, 3, device="meta")
    found = stats_cost(x)
    assert (found.flops, found.bytes) == (840, 2 * 210 + 2 * 4 * 6)
    found = affine_cost(x, numbers, numbers.clone())
    assert (found.flops, found.bytes) == (420, 2 * 420 + 2 * 4 * 6)
    found = wavelet_cost(x, x.clone())
    assert (found.flops, found.bytes) == (210 * 62, 2 * 3 * 210)
