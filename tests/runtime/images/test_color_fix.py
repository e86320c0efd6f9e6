"""The color fixes against their formulas, and on flat images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels.families import FAMILIES, ColorFix
from tinysr_kernels.runtime.color_fix import fix_colors

TINYSR, ADCSR = FAMILIES["tinysr-dit"].adain, FAMILIES["adcsr"].adain


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    """An enlarged image with overshoot and its original, of different colors."""
    generator = torch.Generator().manual_seed(seed)
    lr = torch.rand((2, 3, 9, 7), generator=generator, dtype=torch.float64) * 0.5 + 0.2
    sr = torch.rand((2, 3, 36, 28), generator=generator, dtype=torch.float64) * 1.3 - 0.1
    return sr, lr


def adain(sr: Tensor, lr: Tensor, eps: float) -> Tensor:
    """(SR - mean)/std * std_LR + mean_LR, std = sqrt(unbiased variance + eps), as the formats define it."""
    stats = [(t.mean((2, 3), keepdim=True), (t.var((2, 3), keepdim=True) + eps).sqrt()) for t in (sr, lr)]
    (mean_sr, std_sr), (mean_lr, std_lr) = stats
    return (sr - mean_sr) / std_sr * std_lr + mean_lr


def test_adain_of_tinysr() -> None:
    sr, lr = pair()
    expected = adain(sr.clamp(0, 1), lr, 1e-5).clamp(0, 1)
    torch.testing.assert_close(fix_colors(sr, lr, "adain", TINYSR, 4)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["adcsr", "tinysr-unet"])
def test_adain_of_adcsr(family: str) -> None:
    sr, lr = pair()
    expected = (adain(sr * 2 - 1, lr * 2 - 1, 0.0) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(
        fix_colors(sr, lr, "adain", FAMILIES[family].adain, 4)[0], expected, rtol=1e-12, atol=1e-12
    )


def test_wavelet_takes_the_low_bands_of_the_original() -> None:
    """Five-level decompositions of both, the enlarged image's high bands over the original's low band."""
    sr, lr = pair()
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    kernel = (kernel[:, None] * kernel / 16).expand(3, 1, 3, 3)

    def bands(image: Tensor) -> tuple[Tensor, Tensor]:
        high = torch.zeros_like(image)
        for level in range(5):
            padded = F.pad(image, (2**level,) * 4, mode="replicate")
            low = F.conv2d(padded, kernel, groups=3, dilation=2**level)
            high, image = high + image - low, low
        return high, image

    enlarged = F.interpolate(lr, size=sr.shape[2:], mode="bicubic", antialias=True).clamp(0, 1)
    expected = (bands(sr.clamp(0, 1))[0] + bands(enlarged)[1]).clamp(0, 1)
    torch.testing.assert_close(fix_colors(sr, lr, "wavelet", TINYSR, 4)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["adcsr", "tinysr-dit", "tinysr-unet"])
@pytest.mark.parametrize("method", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_flat_images_stay_flat(family: str, method: ColorFix, level: float) -> None:
    lr = torch.full((1, 3, 8, 8), level)
    noise = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0)) - 0.5
    fixed, finite = fix_colors(level + 0.002 * noise, lr, method, FAMILIES[family].adain, 4)
    assert torch.isfinite(fixed).all()
    assert finite.all()
    assert (fixed - level).abs().max() < 1 / 255


def test_the_gain_of_a_flat_result_is_bounded() -> None:
    lr = torch.rand((1, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    flat = torch.full((1, 3, 32, 32), 0.5)
    flat[..., 0, 0] += 1e-6
    fixed, finite = fix_colors(flat, lr, "adain", ADCSR, 4)
    assert (fixed.std((2, 3)) < 1e-3).all()
    assert finite.all()


def test_one_pixel_keeps_its_color() -> None:
    lr = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1)
    sr = lr.expand(1, 3, 4, 4) + 0.1
    for family in ("adcsr", "tinysr-dit"):
        torch.testing.assert_close(fix_colors(sr, lr, "adain", FAMILIES[family].adain, 4)[0], lr.expand(1, 3, 4, 4))


@pytest.mark.parametrize("method", ["adain", "wavelet", "none"])
def test_bytes_in_and_out(method: ColorFix) -> None:
    """An original in bytes is the image that they stand for, and so is a result."""
    sr, lr = pair()
    bytes_ = lr.mul(255).round().to(torch.uint8)
    exact, _ = fix_colors(sr, bytes_ / torch.tensor(255.0, dtype=torch.float64), method, ADCSR, 4)
    torch.testing.assert_close(fix_colors(sr, bytes_, method, ADCSR, 4)[0], exact, rtol=1e-12, atol=1e-12)
    found, finite = fix_colors(sr, bytes_, method, ADCSR, 4, torch.uint8)
    assert torch.equal(found, exact.mul(255).round().to(torch.uint8))
    assert finite.all()


@pytest.mark.parametrize("family", ["adcsr", "tinysr-dit"])
@pytest.mark.parametrize("method", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows(family: str, method: ColorFix, value: float) -> None:
    """In the image that it is in, though the clamp would hide it."""
    sr, lr = pair()
    sr[1, 2, 17, 3] = value
    _, finite = fix_colors(sr.float(), lr.float(), method, FAMILIES[family].adain, 4, torch.uint8)
    assert [bool(flags.all()) for flags in finite] == [True, False]
