"""adain_fix against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.cases import Arguments, Case, Draw
from tests.ops.contract import errors, is_exact, reference_of
from tests.ops.image.color import Both, ColorContract, change, flagged, unit
from tests.ops.mathematics import altered
from tinysr_kernels.ops.image.adain import AdaINFix

reference = reference_of("adain_fix")


def oracle(x: Tensor, style: Tensor, eps: float, least: float, clamp: bool = False) -> Both:
    def moments(t: Tensor) -> Both:
        count = t.shape[2] * t.shape[3]
        mean = t.sum((2, 3), keepdim=True) / count
        return mean, ((t - mean) ** 2).sum((2, 3), keepdim=True) / max(1, count - 1)

    x = torch.minimum(torch.maximum(x, torch.zeros_like(x)), torch.ones_like(x)) if clamp else x
    (mean, variance), (wanted, wanted_variance) = moments(x), moments(unit(style, torch.float64))
    deviation = torch.maximum((variance + eps) ** 0.5, torch.tensor(least, dtype=torch.float64))
    out = (x - mean) / deviation * (wanted_variance + eps) ** 0.5 + wanted
    return flagged(torch.minimum(torch.maximum(out, torch.zeros_like(out)), torch.ones_like(out)), x.shape[0])


def eager(x: Tensor, style: Tensor, eps: float, least: float, clamp: bool = False) -> Both:
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


MUTANTS = {
    "no clamp": altered(reference, "clamp", lambda _: False),
    "no eps": lambda eps, least, **a: reference(**a, eps=eps / 2, least=max(least, 1e-9)),
    "no least": lambda least, eps, **a: reference(**a, eps=eps + 1e-12, least=0.0),
    "style's mean lost": change(reference, lambda t: t * 0.9),
    "channels shifted": altered(reference, "style", lambda t: t.roll(1, 1)),
    "samples shifted": altered(reference, "style", lambda t: t.roll(1, 0)),
    "last column left out": altered(reference, "style", lambda t: t[..., :-1] if t.shape[3] > 1 else t),
    "over all channels": altered(
        reference, "style", lambda t: t.transpose(1, 2).flatten(2)[:, None].expand(-1, t.shape[1], -1, -1)
    ),
    "flags swapped": lambda **a: (reference(**a)[0], ~reference(**a)[1]),
}
MISTAKES = [
    ({"x": torch.ones(3, 5, 7)}, r"x must be \[N,C,H,W\], found \[3, 5, 7\]"),
    ({"style": torch.ones(3, 5)}, r"style must be \[N,C,h,w\], found \[3, 5\]"),
    ({"style": torch.ones(2, 1, 5, 4)}, r"style must be \[2, 3, 5, 4\], found \[2, 1, 5, 4\]"),
    ({"eps": 0.0}, "eps or least must be positive, found 0.0 and 0.0"),
    ({"dtype": torch.int32}, "dtype must be floating or torch.uint8, found torch.int32"),
]


class TestAdainFix(ColorContract):
    op = "adain_fix"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    mutants = MUTANTS
    mistakes = MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """4 per element of both images for the statistics, 3 of x for the map."""
        return 7 * arguments["x"].numel() + 4 * arguments["style"].numel()


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
    assert errors(naive, exact)[0] > 5 * errors(reference(**arguments)[0], exact)[0]


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


def test_cost_by_hand() -> None:
    x = torch.empty(2, 3, 4, 8, dtype=torch.float16, device="meta")
    style = torch.empty(2, 3, 1, 2, dtype=torch.uint8, device="meta")
    found = AdaINFix(x, style, 0.0, 1.0, dtype=torch.uint8).cost()
    assert (found.flops, found.bytes) == (7 * 192 + 4 * 12, 2 * 192 + 12 + 192 + 2)
