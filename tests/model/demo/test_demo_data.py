"""The demonstration's images, degradations, schedule and files: ranges, shapes and repetition by seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from model.demo import degrade, evaluate, photos, synthetic, train
from model.reference.unet_sr import UNetSR
from tests import ROOT
from tinysr_kernels.families import config_from_dict

CLEAN = degrade.Degradation(sigma_x=0, sigma_y=0, resize="area", gaussian_noise=0, jpeg=None)
SMALL = train.Settings(steps=4, pool=3, refresh=2, precision="float32")


def image(seed: int = 0, size: int = 96) -> degrade.Array:
    return synthetic.image(np.random.default_rng(seed), size).astype(np.float32) / np.float32(255)


# ----------------------------------------------------------------------------------------------------- images
def test_images_repeat_by_seed_and_differ_between_seeds() -> None:
    first, again, other = (synthetic.image(np.random.default_rng(seed), 96) for seed in (3, 3, 4))
    assert first.shape == (96, 96, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_images_have_contrast_and_little_color() -> None:
    images = np.stack([image(seed) for seed in range(10, 22)]).astype(np.float64)
    luminance = images.mean(axis=3)
    chroma = images - luminance[..., None]
    assert 0.2 < luminance.mean() < 0.7
    assert 0.05 < luminance.std(axis=(1, 2)).mean() < 0.35
    assert chroma.std() < luminance.std()


def test_noise_is_normalized_and_its_spectrum_falls() -> None:
    noise = synthetic.power_noise(np.random.default_rng(0), 128, 96, 2.0).astype(np.float64)
    assert noise.shape == (128, 96)
    assert abs(noise.mean()) < 1e-6
    assert noise.std() == pytest.approx(1, abs=1e-5)
    rough = synthetic.power_noise(np.random.default_rng(0), 128, 96, 0.5)
    assert np.abs(np.diff(noise, axis=0)).mean() < np.abs(np.diff(rough, axis=0)).mean()


# -------------------------------------------------------------------------------------------------- degradation
def test_degradation_repeats_by_seed() -> None:
    large = image()
    first, again, other = (
        degrade.degrade(large, degrade.EVALUATION, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (24, 24, 3)
    assert first.dtype == np.float32
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_random_degradations_stay_in_range() -> None:
    large = image()
    for seed in range(30):
        rng = np.random.default_rng(seed)
        small = degrade.degrade(large, degrade.random(rng), rng)
        assert small.min() >= 0
        assert small.max() <= 1
        assert np.array_equal(np.round(small * 255) / np.float32(255), small)
        # Still the same image.
        assert np.corrcoef(small.ravel(), large.reshape(24, 4, 24, 4, 3).mean(axis=(1, 3)).ravel())[0, 1] > 0.5


def test_area_without_blur_is_the_mean_of_squares() -> None:
    large = image()
    small = degrade.reduce([large], [degrade.kernel(CLEAN)])[0]
    assert np.allclose(small, large.reshape(24, 4, 24, 4, 3).mean(axis=(1, 3)), atol=1e-6)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
def test_reduction_matches_torch_inside(kind: degrade.Resize) -> None:
    large = image()
    small = degrade.reduce([large], [degrade.kernel(replace(CLEAN, resize=kind))])[0]
    x = torch.from_numpy(large).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(x, (24, 24), mode=kind, antialias=True)[0].permute(1, 2, 0).numpy()
    assert np.allclose(small[3:-3, 3:-3], wanted[3:-3, 3:-3], atol=1e-5)


def test_kernels_keep_brightness_and_their_axis() -> None:
    for seed in range(10):
        kernel = degrade.kernel(degrade.random(np.random.default_rng(seed)))
        assert kernel.shape == (36, 36)
        assert kernel.sum() == pytest.approx(1, abs=1e-5)
        assert np.allclose(kernel, kernel[::-1, ::-1], atol=1e-7)
    long = degrade.kernel(degrade.Degradation(sigma_x=3.0, sigma_y=0.2, angle=0.0))
    assert long.sum(axis=0).std() < long.sum(axis=1).std()


def test_noise_and_jpeg_do_what_they_say() -> None:
    gray = np.full((64, 64, 3), 0.5, np.float32)
    rng = np.random.default_rng(0)
    noisy = degrade.add_noise_and_jpeg(gray, replace(CLEAN, gaussian_noise=0.04), rng)
    assert (noisy - gray).std() == pytest.approx(0.04, rel=0.05)
    shot = degrade.add_noise_and_jpeg(gray, replace(CLEAN, shot_noise=0.002), rng)
    assert (shot - gray).std() == pytest.approx(0.001**0.5, rel=0.05)
    mono = degrade.add_noise_and_jpeg(gray, replace(CLEAN, gaussian_noise=0.04, gray_noise=True), rng)
    assert np.ptp(mono, axis=2).max() == 0
    small = image(2, 64)
    errors = [
        np.abs(degrade.add_noise_and_jpeg(small, replace(CLEAN, jpeg=q), rng) - small).mean() for q in (30, 60, 95)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="4H,4W,3"):
        degrade.degrade(np.zeros((30, 32, 3), np.float32), CLEAN, np.random.default_rng(0))


# ------------------------------------------------------------------------------------------------------ training
def test_pool_depends_on_seed_and_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def blank(self: train.Pool, number: int) -> np.ndarray:
        made.append(number)
        return np.full((384, 384, 3), number % 256, np.uint8)

    monkeypatch.setattr(train.Pool, "_image", blank)
    pool = train.Pool(SMALL, 0)
    for step in range(11):
        lr, hr = pool.batch(step)
        size = (2, 3, 96, 96) if step % 4 == 3 else (8, 3, 48, 48)
        assert tuple(lr.shape) == size
        assert hr.shape[2:] == (4 * size[2], 4 * size[3])
        fresh = train.Pool(SMALL, step + 1)
        assert all(np.array_equal(a, b) for a, b in zip(pool.images, fresh.images, strict=True))
    assert max(made) == 3 + 11 // 2 - 1
    assert torch.equal(train.Pool(SMALL, 5).batch(5)[0], train.Pool(SMALL, 5).batch(5)[0])


def test_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    batch = (torch.rand(1, 3, 16, 16) * 2 - 1, torch.rand(1, 3, 64, 64) * 2 - 1)
    straight = train.Trainer(SMALL)
    losses = [straight.train_step(*batch) for _ in range(3)]
    assert losses[2] < losses[0]
    first = train.Trainer(SMALL)
    first.train_step(*batch)
    first.save_state(tmp_path / "deep" / "state.pt")
    second = train.Trainer(SMALL)
    second.load_state(tmp_path / "deep" / "state.pt")
    assert [second.train_step(*batch) for _ in range(2)] == losses[1:]
    with pytest.raises(ValueError, match="written with"):
        train.Trainer(replace(SMALL, seed=5)).load_state(tmp_path / "deep" / "state.pt")


def test_exported_file_rebuilds_the_network(tmp_path: Path) -> None:
    network = train.build(seed=1)
    path = tmp_path / "out" / "demo.safetensors"
    train.export(network, path)
    assert path.stat().st_size <= 3_000_000
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    assert (metadata["format"], metadata["family"], metadata["version"]) == ("tinysr_kernels", "tinysr-unet", "1")
    config = config_from_dict("tinysr-unet", json.loads(metadata["config"]))
    assert config == train.CONFIG
    again = UNetSR.from_state(tensors, train.CONFIG)
    lr = torch.rand(1, 3, 16, 24) * 2 - 1
    assert torch.equal(again(lr), torch.nn.functional.interpolate(lr, scale_factor=4.0, mode="bicubic"))


def test_learning_rate_warms_up_and_ends_at_nothing() -> None:
    settings = train.Settings(steps=1000, warmup_steps=100)
    rates = [train.learning_rate(step, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(settings.learning_rate / 100)
    assert max(rates) == pytest.approx(settings.learning_rate)
    assert rates[-1] < 1e-5 * settings.learning_rate


# ---------------------------------------------------------------------------------------------------- evaluation
def test_photographs_fit_the_network() -> None:
    pytest.importorskip("skimage")
    for name in ("chelsea", "camera"):
        image = photos.photograph(name)
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert max(image.shape) <= photos.LARGEST
        assert image.shape[0] % 32 == image.shape[1] % 32 == 0
    with pytest.raises(ValueError, match="astronaut"):
        photos.photograph("nobody")


def test_evaluation_writes_figures_and_image(tmp_path: Path) -> None:
    results, rows = evaluate.evaluate(evaluate.bicubic, names=("chelsea",))
    (result,) = results
    assert result.psnr == result.bicubic_psnr
    assert 15 < result.psnr < 40
    assert 0 < result.ssim < 1
    assert [image.shape for image in rows[0]] == [(evaluate.DETAIL, evaluate.DETAIL, 3)] * 4
    strengths = {"middle": (degrade.EVALUATION, evaluate.means(results))}
    drawn = evaluate.drawn_gains(evaluate.bicubic, 1, ("chelsea",))
    assert drawn == {"chelsea": 0}
    evaluate.write(tmp_path, results, rows, strengths, drawn, "demo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["RESULTS.md", "comparison.png", "results.json"]
    assert json.loads((tmp_path / "results.json").read_text())["mean"]["gain"] == 0
    assert "| chelsea |" in (tmp_path / "RESULTS.md").read_text()


STORED = ROOT / "docs" / "demo" / "results.json"


def test_the_demo_checkpoint_enlarges_better_than_bicubic() -> None:
    """The bar for the checkpoint in the package, on the stored figures."""
    stored = json.loads(STORED.read_text())
    assert stored["mean"]["gain"] >= 0.8
    assert stored["mean"]["least_gain"] > 0
    assert stored["mean"]["ssim"] > stored["mean"]["bicubic_ssim"]
    # The mean must not rest on one photograph: the plainest ones reach it too.
    gains = {p["photograph"]: p["psnr"] - p["bicubic_psnr"] for p in stored["photographs"]}
    plain = ("astronaut", "coffee", "chelsea", "rocket")
    assert sum(gains[name] for name in plain) / len(plain) >= 0.8
    assert {p["photograph"] for p in stored["photographs"]} == set(photos.NAMES)


@pytest.mark.parametrize("name", ["chelsea", "coins"])
def test_the_stored_figures_are_what_the_checkpoint_gives(name: str) -> None:
    ((result,), _) = evaluate.evaluate(evaluate.compiled("demo"), names=(name,))
    (stored,) = (p for p in json.loads(STORED.read_text())["photographs"] if p["photograph"] == name)
    assert result.psnr == pytest.approx(stored["psnr"], abs=0.02)
    assert result.ssim == pytest.approx(stored["ssim"], abs=0.001)
    assert result.bicubic_psnr == pytest.approx(stored["bicubic_psnr"], abs=0.02)
