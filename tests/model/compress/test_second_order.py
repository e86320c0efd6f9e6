"""The second-order degradation: its kernels and steps against formulas, its draws against its settings; its folders."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.compress.recipe import Recipe, build
from model.compress.training import second_order
from model.compress.training.image_folder import ImageFolder
from model.compress.training.second_order import (
    Order,
    SecondOrder,
    circular_sinc,
    degrade,
    draw_kernel,
    filtered,
    gaussian_like,
    with_noise,
)

NOTHING = Order(blur=0, enlarge=0, reduce=0, gaussian=1, noise=(0, 0), jpeg=(100, 100))


def photo(side: int = 96, seed: int = 0) -> np.ndarray:
    """Smooth, with all levels in it."""
    x = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(x, size=(side, side), mode="bicubic").clamp(0, 1)
    return smooth[0].permute(1, 2, 0).contiguous().numpy()


@pytest.mark.parametrize("shape", second_order.SHAPES)
def test_kernels_follow_their_formulas(shape: str) -> None:
    widths, angle, beta = (2.0, 0.7), 0.6, 1.7
    found = gaussian_like(9, shape, widths, angle, beta)
    assert found.sum() == pytest.approx(1)
    for y, x in ((0, 3), (-2, 1), (4, -4)):
        u = np.cos(angle) * x + np.sin(angle) * y
        v = -np.sin(angle) * x + np.cos(angle) * y
        q = (u / widths[0]) ** 2 + (v / widths[1]) ** 2
        value = {
            "gaussian": np.exp(-q / 2),
            "generalized": np.exp(-(q**beta) / 2),
            "plateau": 1 / (1 + q**beta),
        }[shape]
        assert found[4 + y, 4 + x] / found[4, 4] == pytest.approx(value, rel=1e-9)


def test_the_sinc_filter_is_a_low_pass_that_rings() -> None:
    found = circular_sinc(21, np.pi / 3)
    assert found.sum() == pytest.approx(1)
    assert found.min() < 0
    assert np.allclose(found, found.T)
    assert np.allclose(found, found[::-1])
    passed = np.abs(np.fft.fft2(found, s=(64, 64)))
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64))) * 2 * np.pi
    assert passed[frequency < 0.6 * np.pi / 3].min() > 0.8
    assert passed[frequency > 1.6 * np.pi / 3].max() < 0.2


def test_filters_leave_constant_images_and_reflect_borders() -> None:
    kernel = gaussian_like(21, "gaussian", (3, 3), 0)
    for size in ((40, 31), (7, 9)):  # the second is smaller than half of the kernel
        assert torch.allclose(filtered(torch.full((3, *size), 0.3), kernel), torch.tensor(0.3))


def test_noise_has_the_width_that_was_drawn() -> None:
    x = torch.full((3, 64, 64), 0.5)
    gaussian = Order(gaussian=1, gray=0, noise=(20, 20))
    noise = with_noise(x, gaussian, np.random.default_rng(0)) - x
    assert float(noise.std()) == pytest.approx(20 / 255, rel=0.03)
    assert float((noise[0] * noise[1]).mean()) == pytest.approx(0, abs=2e-4)
    gray = with_noise(x, dataclasses.replace(gaussian, gray=1.0), np.random.default_rng(0)) - x
    assert torch.equal(gray[0], gray[2])
    ramp = torch.from_numpy(photo(128)).permute(2, 0, 1)
    levels = 2 ** np.ceil(np.log2(len(np.unique(np.round(ramp.numpy() * 255)))))
    shot = with_noise(ramp, Order(gaussian=0, gray=0, poisson=(2, 2)), np.random.default_rng(0)) - ramp
    middle = (ramp > 0.45) & (ramp < 0.55)
    assert float(shot[middle].std()) == pytest.approx(2 * (0.5 / levels) ** 0.5, rel=0.1)
    dark = (ramp > 0.05) & (ramp < 0.15)
    assert float(shot[dark].std()) < 0.7 * float(shot[middle].std())


def test_kernels_are_drawn_by_their_probabilities() -> None:
    rng = np.random.default_rng(0)
    kernels = [draw_kernel(Order(), rng) for _ in range(1500)]
    assert {k.shape[0] for k in kernels} == set(range(7, 22, 2))
    assert all(abs(k.sum() - 1) < 1e-9 for k in kernels)
    assert np.mean([k.min() < -1e-12 for k in kernels]) == pytest.approx(0.1, abs=0.03)
    round_ones = np.mean([np.allclose(k, k.T, atol=1e-12) for k in kernels])
    assert round_ones == pytest.approx(0.1 + 0.9 * (0.7 - 0.25 + 0.3 * 0.8), abs=0.05)
    sincs = [draw_kernel(Order(sinc=1.0), rng) for _ in range(20)]
    assert all(np.allclose(k, k.T) for k in sincs)


def test_an_image_without_damage_is_only_reduced() -> None:
    how = SecondOrder(NOTHING, NOTHING, final_sinc=0)
    image = photo()
    found = degrade(image, how, np.random.default_rng(0))
    area = image.reshape(24, 4, 24, 4, 3).mean((1, 3))
    assert found.shape == (24, 24, 3)
    assert np.abs(found - area).mean() < 0.02


def test_results_depend_on_the_generator_alone() -> None:
    image, how = photo(), SecondOrder()
    found = [degrade(image, how, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    for seed in range(60):
        one = degrade(photo(64, seed), how, np.random.default_rng(seed))
        assert one.shape == (16, 16, 3)
        assert one.dtype == np.float32
        assert np.isfinite(one).all()
        assert 0 <= one.min() <= one.max() <= 1
        assert np.abs(one * 255 - np.round(one * 255)).max() < 1e-3


def test_each_setting_matters() -> None:
    """A heavier one is further from the plain reduction."""
    image = photo()
    plain = degrade(image, SecondOrder(NOTHING, NOTHING, 0), np.random.default_rng(0))

    def distance(**changed: object) -> float:
        how = SecondOrder(dataclasses.replace(NOTHING, **changed), NOTHING, 0)  # type: ignore[arg-type]
        return float(np.mean([np.abs(degrade(image, how, np.random.default_rng(k)) - plain).mean() for k in range(8)]))

    nothing = distance()
    assert distance(blur=1.0, sinc=0.0, sigma=(6, 6), shapes=(1, 0, 0)) > nothing + 0.005
    assert distance(reduce=1.0, scale=(0.1, 0.15)) > nothing + 0.005
    assert distance(noise=(40, 40)) > nothing + 0.01
    assert distance(jpeg=(1, 2)) > nothing + 0.01


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"first": {"blur": 1.5}}, "blur: expected a probability"),
        ({"first": {"sigma": [3, 1]}}, "sigma: expected a lower and an upper bound"),
        ({"second": {"jpeg": [0, 90]}}, "jpeg: expected a lower"),
        ({"second": {"jpeg": [30, 101]}}, "jpeg: expected a lower"),
        ({"first": {"shapes": [1, 1, 1]}}, "sum to 1"),
        ({"first": {"shapes": [1]}}, "a probability for each of gaussian"),
        ({"first": {"enlarge": 0.6, "reduce": 0.6}}, "a sum of at most 1"),
        ({"first": {"noise": ["a", 3]}}, "noise: expected numbers"),
        ({"final_sinc": -0.1}, "final_sinc: expected a probability"),
        ({"third": {}}, "unknown field 'third'"),
    ],
)
def test_settings_that_do_not_fit(changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Recipe, {"teacher": "t", "images": "p", "out": "o", "degradation": changed}, "recipe.json")


def test_settings_from_a_file() -> None:
    values = {"first": {"noise": [0, 5]}, "second": {"blur": 0.25}}
    made = build(Recipe, {"teacher": "t", "images": "p", "out": "o", "degradation": values}, "recipe.json").degradation
    assert made.first == Order(noise=(0, 5))
    assert made.second == dataclasses.replace(second_order.SECOND, blur=0.25)


# ----------------------------------------------------------------------------------------------------------- folders
def test_given_pairs_are_cut_at_the_same_place(tmp_path: Path) -> None:
    """The large image is the small one with every pixel four times as wide."""
    rng = np.random.default_rng(0)
    for name in ("a", "inside/b"):
        small = rng.integers(0, 256, (40, 50, 3), np.uint8)
        for folder, pixels, suffix in (("hr", small.repeat(4, 0).repeat(4, 1), ".png"), ("lr", small, ".bmp")):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}{suffix}")
    folder = ImageFolder(tmp_path / "hr", 64, 0, low=tmp_path / "lr")
    for step in range(6):
        low, high = folder._pair(np.random.default_rng(step))
        assert low.shape == (16, 16, 3)
        assert np.array_equal(low.repeat(4, 0).repeat(4, 1), high)
    enlarged, original = folder.pairs(0, 2)
    assert enlarged.shape == original.shape == (2, 3, 64, 64)


def test_pairs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for folder, size in (("hr", 128), ("lr", 31), ("tiny-hr", 32), ("tiny-lr", 8)):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (size, size)).save(tmp_path / folder / "a.png")
    with pytest.raises(ValueError, match=r"a\.png: expected 4 times the size of its low-resolution image \(31, 31\)"):
        ImageFolder(tmp_path / "hr", 64, 0, low=tmp_path / "lr").pairs(0, 1)
    with pytest.raises(ValueError, match="smaller than the 64 pixels"):
        ImageFolder(tmp_path / "tiny-hr", 64, 0, low=tmp_path / "tiny-lr").pairs(0, 1)
    (tmp_path / "lr" / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.png: expected one image .*lr/a with one of"):
        ImageFolder(tmp_path / "hr", 64, 0, low=tmp_path / "lr")
