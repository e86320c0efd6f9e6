"""Images of any size through networks of particular sizes, against the reference pipelines in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model import pipelines as oracle
from tests.nets.test_networks import compiled, tinysr_parts, unet_parts
from tinysr_kernels.errors import InputError, NonFiniteOutput, OutOfMemory
from tinysr_kernels.families import TinySRConfig
from tinysr_kernels.nets import PixelNetwork
from tinysr_kernels.runtime import pipelines
from tinysr_kernels.runtime.color import fix_colors
from tinysr_kernels.runtime.pipelines import Limits, check_upscale, finite_or_wider, restore


def image(height: int, width: int, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.rand((batch, 3, height, width), generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def tinysr():
    transformer, vae, config = tinysr_parts(separable_decoder=False)
    config = TinySRConfig(
        head_dim=config.head_dim, encoder_blocks=config.encoder_blocks, decoder_blocks=config.decoder_blocks,
        scaling_factor=config.scaling_factor, overlap=2,
    )  # fmt: skip
    tensors = transformer.normalised_state() | vae.state_dict()
    return compiled("tinysr-dit", config, tensors, torch.float64), transformer, vae, config


# the window is 8 latent pixels = 16 pixels at factor 4: smaller, equal, larger, odd, long, and in batches
@pytest.mark.parametrize("size", [(1, 1), (3, 16), (16, 16), (17, 40), (31, 18), (1, 70)])
@pytest.mark.parametrize("upscale", [4, 2, 3])
def test_tinysr_at_any_size(tinysr, size: tuple[int, int], upscale: int) -> None:
    network, transformer, vae, config = tinysr
    lr = image(*size, batch=2)
    sr = restore(network, lr, upscale, Limits(window_batch=3), config.overlap)
    found = fix_colors(sr, lr, "adain", "tinysr-dit", upscale)
    expected = oracle.tinysr(lr, transformer, vae, config, "adain", upscale)
    assert found.shape == (2, 3, size[0] * upscale, size[1] * upscale)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_tinysr_gives_the_same_when_the_vae_runs_in_tiles(tinysr) -> None:
    network, *_, config = tinysr
    lr = image(16, 70)
    whole = restore(network, lr, 4, Limits(), config.overlap)
    tiled = restore(network, lr, 4, Limits(vae_core=7), config.overlap)
    torch.testing.assert_close(tiled, whole, rtol=1e-11, atol=1e-11)


@pytest.fixture(scope="module")
def pixel():
    unet, decoder, config = unet_parts("adcsr")
    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    return compiled("adcsr", config, tensors, torch.float64), unet, decoder, config


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 17), (20, 3)])
def test_adcsr_at_any_size(pixel, size: tuple[int, int]) -> None:
    network, unet, decoder, config = pixel
    lr = image(*size)
    found = fix_colors(restore(network, lr, 4, Limits(), 0), lr, "adain", "adcsr", 4)
    expected = oracle.adcsr(lr, unet, decoder, config)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_tiles_of_a_unet_cover_the_image(pixel) -> None:
    """Every output pixel is a weighted mean of what tiles computed there; away from other tiles it is one tile's."""
    network, *_ = pixel
    lr = image(40, 72)
    tiled = restore(network, lr, 4, Limits(tile=32), 0)
    assert tiled.shape == (1, 3, 160, 288)
    corner = network(lr[:, :, :32, :32])[:, :, :32, :32]
    torch.testing.assert_close(tiled[:, :, :32, :32], corner, rtol=1e-10, atol=1e-11)


def test_memory_decides_about_tiles(pixel, monkeypatch: pytest.MonkeyPatch) -> None:
    network, *_ = pixel
    sizes: list[tuple[int, ...]] = []
    forward = PixelNetwork.forward

    def spy(self: PixelNetwork, x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape[2:]))
        return forward(self, x)

    monkeypatch.setattr(PixelNetwork, "forward", spy)
    monkeypatch.setattr(pipelines, "SMALLEST_TILE", 16)
    limits = Limits(bytes_per_pixel=1000.0)
    for free, expected in ((10**9, (24, 40)), (2 * 20 * 20 * 1000, (20, 20)), (1, (16, 16))):
        monkeypatch.setattr(pipelines, "available_memory", lambda free=free: free)
        sizes.clear()
        restore(network, image(24, 40), 4, limits, 0)
        assert set(sizes) == {expected}


def test_out_of_memory_makes_tiles_smaller(pixel, monkeypatch: pytest.MonkeyPatch) -> None:
    network, *_ = pixel
    forward = PixelNetwork.forward

    def scarce(self: PixelNetwork, x: Tensor) -> Tensor:
        if x.shape[2] * x.shape[3] > 20 * 20:
            raise torch.OutOfMemoryError("no room")
        return forward(self, x)

    lr = image(40, 12)
    monkeypatch.setattr(pipelines, "SMALLEST_TILE", 16)
    expected = restore(network, lr, 4, Limits(tile=20), 0)
    monkeypatch.setattr(PixelNetwork, "forward", scarce)
    assert torch.equal(restore(network, lr, 4, Limits(), 0), expected)
    with pytest.raises(OutOfMemory, match="tile of 32x32"):
        restore(network, image(40, 40), 4, Limits(tile=32), 0)  # an explicit setting stays
    monkeypatch.setattr(PixelNetwork, "forward", lambda self, x: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(OutOfMemory, match="16x16"):
        restore(network, lr, 4, Limits(), 0)


def test_a_pixel_network_has_one_factor(pixel, tinysr) -> None:
    with pytest.raises(InputError, match="enlarges by 4"):
        check_upscale(pixel[0], 2)
    with pytest.raises(InputError, match="1 to 16"):
        check_upscale(tinysr[0], 17)


def test_overflow_goes_to_the_wider_network() -> None:
    """A network whose activations leave float16 is run again in float32; one that is broken is named."""
    unet, decoder, config = unet_parts("separable")
    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    tensors["decoder.mid_block.resnets.0.conv2.pointwise.bias"] = torch.full((20,), 1e6, dtype=torch.float64)
    half = compiled("tinysr-unet", config, tensors, torch.float16)
    single = compiled("tinysr-unet", config, tensors, torch.float32)
    lr = image(8, 8).float()

    def run(network: PixelNetwork, x: Tensor) -> Tensor:
        return restore(network, x, 4, Limits(), 0)

    out, attempt = finite_or_wider(run, [lambda: half, lambda: single], lr)
    assert attempt == 1
    torch.testing.assert_close(out, run(single, lr))
    with pytest.raises(NonFiniteOutput, match="not finite"):
        finite_or_wider(run, [lambda: half], lr)
