"""The reference pipelines, from padding to whole inference, against independent formulations."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.reference import pipelines
from model.reference.pipelines import adain, adain_plain, pad_to, predict, tile_starts, tile_weight, wavelet
from tests.layouts.adcsr import AdcSRLayout, write_adcsr
from tests.layouts.tinysr import TinySRLayout, write_tinysr
from tests.layouts.unet import write_unet
from tests.layouts.weights import random_image
from tinysr_kernels.families import ColorFix, TinySRConfig, UNetConfig

TIGHT = {"rtol": 1e-11, "atol": 1e-12}
SIZES = [(1, 1), (1, 37), (33, 2), (31, 32), (32, 32), (45, 51)]


@pytest.fixture(scope="module")
def tinysr(tmp_path_factory: pytest.TempPathFactory) -> TinySRLayout:
    """A window of 16 latent pixels: 32 pixels of the low-resolution image."""
    config = TinySRConfig(encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1), scaling_factor=1.3)
    return write_tinysr(tmp_path_factory.mktemp("tinysr"), config=config, vae_width=12)


@pytest.fixture(scope="module")
def adcsr(tmp_path_factory: pytest.TempPathFactory) -> AdcSRLayout:
    return write_adcsr(tmp_path_factory.mktemp("adcsr"), channels=(48, 48, 48, 48), decoder_channels=(4, 6, 8, 8))


def enlarged(image: Tensor) -> Tensor:
    return F.interpolate(image, scale_factor=4, mode="bicubic", align_corners=False)


def as_pillow(image: Tensor) -> Tensor:
    size = (4 * image.shape[2], 4 * image.shape[3])
    return F.interpolate(image, size=size, mode="bicubic", antialias=True).clamp(0, 1)


# ------------------------------------------------------------------------------------------------ padding
@given(height=st.integers(1, 40), width=st.integers(1, 40), multiple=st.integers(1, 16), least=st.integers(1, 40))
def test_padding(height: int, width: int, multiple: int, least: int) -> None:
    """As numpy pads: right and bottom, reflected, or with the border repeated where that is too short."""
    image = random_image(height, width, dtype=torch.float64)
    padded = pad_to(image, multiple, least)
    expected = image.numpy()
    for axis, (side, size) in enumerate(zip(padded.shape[2:], (height, width), strict=True), start=2):
        assert side % multiple == 0
        assert side >= max(size, least)
        assert side < max(size, least) + multiple
        room = [(0, 0)] * 4
        room[axis] = (0, side - size)
        expected = np.pad(expected, room, mode="reflect" if side - size < size else "edge")
    assert np.array_equal(padded.numpy(), expected)


def test_image_that_fits_is_not_touched() -> None:
    image = random_image(32, 48)
    assert pad_to(image, 16, 32) is image


# -------------------------------------------------------------------------------------------------- tiles
def test_weights_follow_the_public_formula() -> None:
    """Written out element by element, for the released window and a small one."""
    for window in (64, 16):
        weight = tile_weight(window)
        for y in range(0, window, 5):
            for x in range(0, window, 3):
                down = math.exp(-(((y - window / 2) / window) ** 2) / 0.02) / math.sqrt(0.02 * math.pi)
                across = math.exp(-(((x - (window - 1) / 2) / window) ** 2) / 0.02) / math.sqrt(0.02 * math.pi)
                assert math.isclose(float(weight[y, x]), down * across, rel_tol=1e-12)
    assert torch.equal(tile_weight(16), tile_weight(16).flip(1))
    assert not torch.allclose(tile_weight(16), tile_weight(16).flip(0))


@given(window=st.integers(2, 70), more=st.integers(0, 300), share=st.floats(0, 0.9))
def test_tiles_cover_everything(window: int, more: int, share: float) -> None:
    overlap, length = min(int(window * share), window - 1), window + more
    starts = tile_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] == length - window
    step = window - overlap
    assert starts[:-1] == [i * step for i in range(len(starts) - 1)]
    # Each tile begins before the one before it has left its overlap, and no tile is there twice.
    assert all(0 < b - a <= step for a, b in itertools.pairwise(starts))


def test_released_tiles() -> None:
    assert tile_starts(64, 64, 8) == [0]
    assert tile_starts(65, 64, 8) == [0, 1]
    assert tile_starts(120, 64, 8) == [0, 56]
    assert tile_starts(121, 64, 8) == [0, 56, 57]
    assert tile_starts(200, 64, 8) == [0, 56, 112, 136]


def contrast(z: Tensor) -> Tensor:
    """Stands for the transformer: what it gives for a pixel depends on the whole tile."""
    return (z - z.mean(dim=(2, 3), keepdim=True)) * z.std(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize(("height", "width"), [(16, 17), (24, 16), (31, 43)])
def test_overlapping_tiles_are_averaged_by_weight(height: int, width: int) -> None:
    """Against a loop over output pixels that asks every tile which covers them."""
    window, overlap = 16, 8
    z = torch.randn(1, 2, height, width, dtype=torch.float64)
    found = predict(z, contrast, window, overlap)
    step = window - overlap
    tops = [min(i * step, height - window) for i in range(-(-(height - window) // step) + 1)]
    lefts = [min(i * step, width - window) for i in range(-(-(width - window) // step) + 1)]
    tiles = {(t, s): contrast(z[..., t : t + window, s : s + window]) for t in tops for s in lefts}
    weight = tile_weight(window)
    for y in range(height):
        for x in range(width):
            covering = [(t, s) for t, s in tiles if t <= y < t + window and s <= x < s + window]
            weights = [float(weight[y - t, x - s]) for t, s in covering]
            values = [tiles[t, s][0, :, y - t, x - s] * w for (t, s), w in zip(covering, weights, strict=True)]
            torch.testing.assert_close(found[0, :, y, x], sum(values) / sum(weights), **TIGHT)


def test_latent_of_the_window_runs_once_and_unweighted() -> None:
    z = torch.randn(2, 3, 16, 16)
    assert torch.equal(predict(z, contrast, 16, 8), contrast(z))


def test_tiles_are_summed_in_float32() -> None:
    """Half-precision predictions that agree stay what they are; their weights go down to 1e-11."""
    z = torch.randn(1, 2, 40, 40).half()
    found = predict(z, lambda tile: tile, 16, 8)
    assert found.dtype == torch.float16
    assert torch.equal(found, z)


# ------------------------------------------------------------------------------------------- color fixes
def test_adain_takes_over_mean_and_deviation() -> None:
    sr, lr = random_image(40, 36, count=2, seed=1, dtype=torch.float64), random_image(10, 9, count=2, seed=2).double()
    fixed = adain(sr, lr)
    assert torch.allclose(fixed.mean((2, 3)), lr.mean((2, 3)), **TIGHT)
    gain = ((lr.var((2, 3)) + 1e-5) / (sr.var((2, 3)) + 1e-5)).sqrt()
    assert torch.allclose(fixed.std((2, 3)), sr.std((2, 3)) * gain, **TIGHT)


def test_adcsr_colors_follow_the_public_formula() -> None:
    """Mean and unbiased deviation, no epsilon, wherever the image is not flat."""
    sr = random_image(40, 36, count=2, seed=1, dtype=torch.float64) * 2.4 - 1.2
    lr = random_image(10, 9, count=2, seed=2, dtype=torch.float64) * 2 - 1
    dims = {"dim": (2, 3), "keepdim": True}
    expected = (sr - sr.mean(**dims)) / sr.std(**dims) * lr.std(**dims) + lr.mean(**dims)
    torch.testing.assert_close(adain_plain(sr, lr), expected, **TIGHT)


@pytest.mark.parametrize("level", [-1.0, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 1e-7, 1e-4])
def test_flat_images_stay_flat(level: float, noise: float) -> None:
    """The gain over a flat result is at most the original's deviation over 1/255 of the range."""
    sr = level + noise * torch.randn(1, 3, 40, 40, dtype=torch.float64)
    flat = torch.full((1, 3, 10, 10), 0.2, dtype=torch.float64)
    torch.testing.assert_close(adain_plain(sr, flat), torch.full_like(sr, 0.2), **TIGHT)
    lively = random_image(10, 10, dtype=torch.float64) * 2 - 1
    fixed = adain_plain(sr, lively)
    # Not exact zero: the mean of equal numbers can be off by a rounding, which the gain enlarges.
    bound = (sr - sr.mean((2, 3), keepdim=True)).abs().amax() * 255 / 2 * lively.std((2, 3)).amax() + 1e-12
    assert float((fixed - fixed.mean((2, 3), keepdim=True)).abs().amax()) <= bound
    assert torch.allclose(fixed.mean((2, 3)), lively.mean((2, 3)), **TIGHT)


def test_single_pixel_has_no_deviation() -> None:
    sr, lr = random_image(4, 4, dtype=torch.float64), random_image(1, 1, dtype=torch.float64)
    assert torch.isfinite(adain(sr, lr)).all()
    torch.testing.assert_close(adain_plain(sr, lr), lr.expand_as(sr), **TIGHT)


def test_wavelet_is_high_bands_over_low_band() -> None:
    """Both images decomposed in five levels: sr's high bands, summed, plus the style's last low band."""
    sr, style = random_image(70, 50, seed=1, dtype=torch.float64), random_image(70, 50, seed=2, dtype=torch.float64)

    def smoothed(image: np.ndarray, distance: int) -> np.ndarray:
        room = [(0, 0), (0, 0), (distance, distance), (distance, distance)]
        wide = np.pad(image, room, mode="edge")
        total = np.zeros_like(image)
        for i, a in enumerate((1, 2, 1)):
            for j, b in enumerate((1, 2, 1)):
                rows = slice(i * distance, i * distance + image.shape[2])
                columns = slice(j * distance, j * distance + image.shape[3])
                total += a * b / 16 * wide[:, :, rows, columns]
        return total

    def decomposed(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bands = []
        for level in range(5):
            low = smoothed(image, 2**level)
            bands.append(image - low)
            image = low
        return sum(bands), image

    expected = decomposed(sr.numpy())[0] + decomposed(style.numpy())[1]
    torch.testing.assert_close(wavelet(sr, style), torch.from_numpy(expected), **TIGHT)


# ------------------------------------------------------------------------------------------------- TinySR
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
def test_tinysr_gives_exact_sizes(tinysr: TinySRLayout, size: tuple[int, int], color_fix: ColorFix) -> None:
    sr = tinysr.upscale(random_image(*size), color_fix)
    assert sr.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert sr.dtype == torch.float32
    assert torch.isfinite(sr).all()
    assert float(sr.min()) >= 0
    assert float(sr.max()) <= 1


def public_tinysr(layout: TinySRLayout, image: Tensor) -> Tensor:
    """One window, step by step, on diffusers' AutoencoderTiny: the image around [-1,1], not clamped."""
    state = layout.vae.state_dict()
    dense = {}
    for name, tensor in state.items():
        if name.endswith("depthwise.weight"):
            product = state[name.replace("depthwise", "pointwise")] * tensor[:, 0]
            dense[name.replace("depthwise.weight", "weight")] = product
        elif not name.endswith("pointwise.weight"):
            dense[name.replace("pointwise.bias", "bias")] = tensor
    blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
    widths = {"encoder_block_out_channels": (12,) * 4, "decoder_block_out_channels": (12,) * 4}
    vae = AutoencoderTiny(latent_channels=16, scaling_factor=layout.config.scaling_factor, **blocks, **widths)
    vae.load_state_dict(dense)
    vae.to(image.dtype).requires_grad_(False)
    z = vae.encode(enlarged(image) * 2 - 1).latents * vae.config.scaling_factor
    z = z - layout.transformer.to(image.dtype)(z)
    decoded = vae.decode(z / vae.config.scaling_factor).sample
    layout.transformer.float()
    return decoded


def test_tinysr_on_one_window_is_the_public_pipeline(tinysr: TinySRLayout) -> None:
    image = random_image(32, 32, count=2)
    sr = public_tinysr(tinysr, image).clamp(-1, 1) / 2 + 0.5
    result = {"none": sr}
    dims = {"dim": (2, 3), "keepdim": True}
    deviation, aim = (sr.var(**dims) + 1e-5).sqrt(), (image.var(**dims) + 1e-5).sqrt()
    result["adain"] = (sr - sr.mean(**dims)) / deviation * aim + image.mean(**dims)
    result["wavelet"] = wavelet(sr, as_pillow(image))
    for color_fix, expected in result.items():
        found = tinysr.upscale(image, color_fix)
        assert float((found - expected.clamp(0, 1)).norm() / expected.norm()) < 1e-5, color_fix


def test_tinysr_pads_and_crops(tinysr: TinySRLayout) -> None:
    """31x30 is reflected to 32x32; 9x40 has 23 rows to add and only 9, so its last row is repeated."""
    for height, width, mode, side in ((31, 30, "reflect", 32), (9, 40, "edge", 40)):
        image = random_image(height, width, dtype=torch.float64)
        room = ((0, 0), (0, 0), (0, 32 - height), (0, side - width))
        padded = torch.from_numpy(np.pad(image.numpy(), room, mode=mode))
        expected = tinysr.upscale(padded, "none")[..., : 4 * height, : 4 * width]
        torch.testing.assert_close(tinysr.upscale(image, "none"), expected, **TIGHT)
        # The colors are the unpadded image's.
        fixed = tinysr.upscale(image, "adain")
        torch.testing.assert_close(fixed, adain(expected, image).clamp(0, 1), **TIGHT)


def test_batch_is_one_by_one(tinysr: TinySRLayout, adcsr: AdcSRLayout) -> None:
    images = random_image(33, 35, count=2, dtype=torch.float64)
    for layout in (tinysr, adcsr):
        single = torch.cat([layout.upscale(image[None]) for image in images])
        torch.testing.assert_close(layout.upscale(images), single, **TIGHT)


@pytest.mark.parametrize("upscale", [1, 2, 3])
def test_tinysr_other_factors(tinysr: TinySRLayout, upscale: int) -> None:
    image = random_image(19, 50)
    sr = pipelines.tinysr(image, tinysr.transformer, tinysr.vae, tinysr.config, "adain", upscale)
    assert sr.shape == (1, 3, 19 * upscale, 50 * upscale)


# ------------------------------------------------------------------------------------------- pruned UNets
@pytest.mark.parametrize("size", SIZES)
def test_adcsr_gives_exact_sizes(adcsr: AdcSRLayout, size: tuple[int, int]) -> None:
    sr = adcsr.upscale(random_image(*size))
    assert sr.shape == (1, 3, 4 * size[0], 4 * size[1])
    assert torch.isfinite(sr).all()
    assert float(sr.min()) >= 0
    assert float(sr.max()) <= 1


def test_adcsr_is_the_public_pipeline(adcsr: AdcSRLayout) -> None:
    assert pipelines.lr_multiple(adcsr.unet, adcsr.config) == 16
    image = random_image(32, 48)
    lr = image * 2 - 1
    sr = adcsr.decoder(adcsr.unet(torch.nn.PixelUnshuffle(2)(lr)))
    dims = {"dim": (2, 3), "keepdim": True}
    sr = (sr - sr.mean(**dims)) / sr.std(**dims) * lr.std(**dims) + lr.mean(**dims)
    expected = (sr / 2 + 0.5).clamp(0, 1)
    assert float((adcsr.upscale(image) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_flat_originals_give_flat_results(tinysr: TinySRLayout, adcsr: AdcSRLayout, value: float) -> None:
    image = torch.full((1, 3, 20, 20), value)
    assert torch.allclose(adcsr.upscale(image), torch.full((1, 3, 80, 80), value), atol=1e-6)
    # TinySR's epsilon leaves a deviation of at most sqrt(1e-5) about the original's value.
    assert float((tinysr.upscale(image) - value).square().mean().sqrt()) <= 1e-5**0.5


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
def test_bicubic_residual(tmp_path: Path, color_fix: ColorFix) -> None:
    """The enlarged input is added before the color fix, in [-1,1]."""
    config = UNetConfig(residual="bicubic", color_fix=color_fix)
    layout = write_unet(tmp_path / "unet.safetensors", config)
    image = random_image(12, 16, dtype=torch.float64)
    lr = image * 2 - 1
    unet, decoder = layout.unet.double(), layout.decoder.double()
    sr = decoder(unet(F.pixel_unshuffle(lr, 2))) + enlarged(lr)
    if color_fix == "adain":
        expected = (adain_plain(sr, lr) / 2 + 0.5).clamp(0, 1)
    else:
        expected = (sr / 2 + 0.5).clamp(0, 1)
        if color_fix == "wavelet":
            expected = wavelet(expected, as_pillow(image)).clamp(0, 1)
    torch.testing.assert_close(layout.upscale(image), expected, **TIGHT)


@pytest.mark.parametrize("prediction", ["direct", "subtract"])
def test_vae_input(tmp_path: Path, prediction: str) -> None:
    config = UNetConfig(
        input="vae",
        prediction=prediction,
        scaling_factor=1.7,
        color_fix="none",
        encoder_blocks=(1, 1, 1),
        decoder_blocks=(1, 1, 1),
    )
    layout = write_unet(tmp_path / "unet.safetensors", config, decoder="tiny")
    image = random_image(8, 12, dtype=torch.float64)
    parts = [part.double() for part in (layout.encoder, layout.unet, layout.decoder)]
    encoder, unet, decoder = parts
    z = encoder(enlarged(image * 2 - 1)) * 1.7
    z = z - unet(z) if prediction == "subtract" else unet(z)
    expected = (decoder(z / 1.7) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(layout.upscale(image), expected, **TIGHT)
    # 4x enlarged, latents at a quarter, one halving: the sides must be even, and any are accepted.
    assert pipelines.lr_multiple(unet, config, encoder) == 2
    assert layout.upscale(random_image(5, 7)).shape == (1, 3, 20, 28)
