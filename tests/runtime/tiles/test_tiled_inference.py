"""Images of any size through networks of particular sizes, against the reference pipelines in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.reference import pipelines as oracle
from tests.nets.test_networks import compiled, tinysr_parts, unet_parts
from tinysr_kernels.errors import InputError
from tinysr_kernels.families import FAMILIES, TinySRConfig
from tinysr_kernels.runtime.color_fix import fix_colors
from tinysr_kernels.runtime.tiles import tiled_inference
from tinysr_kernels.runtime.tiles.limits import Limits
from tinysr_kernels.runtime.tiles.tiled_inference import restore, use_upscale


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
    tensors = transformer.normalized_state() | vae.state_dict()
    return compiled("tinysr-dit", config, tensors, torch.float64), transformer, vae, config


# the window is 8 latent pixels = 16 pixels at factor 4: smaller, equal, larger, odd, long, and in batches
@pytest.mark.parametrize("size", [(1, 1), (3, 16), (16, 16), (17, 40), (31, 18), (1, 70)])
@pytest.mark.parametrize("upscale", [4, 2, 3])
def test_tinysr_at_any_size(tinysr, size: tuple[int, int], upscale: int) -> None:
    network, transformer, vae, config = tinysr
    lr = image(*size, batch=2)
    sr = restore(network, lr, upscale, Limits(window_batch=3))
    found, _ = fix_colors(sr, lr, "adain", FAMILIES["tinysr-dit"].adain, upscale)
    expected = oracle.tinysr(lr, transformer, vae, config, "adain", upscale)
    assert found.shape == (2, 3, size[0] * upscale, size[1] * upscale)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_tinysr_gives_the_same_when_the_vae_runs_in_tiles(tinysr) -> None:
    network, *_ = tinysr
    lr = image(16, 70)
    whole = restore(network, lr, 4, Limits())
    tiled = restore(network, lr, 4, Limits(vae_core=7))
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
    found, _ = fix_colors(restore(network, lr, 4, Limits()), lr, "adain", FAMILIES["adcsr"].adain, 4)
    expected = oracle.adcsr(lr, unet, decoder, config)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)


def test_tiles_of_a_unet_cover_the_image(pixel) -> None:
    """Every output pixel is a weighted mean of what tiles computed there; away from other tiles it is one tile's."""
    network, *_ = pixel
    lr = image(40, 72)
    tiled = restore(network, lr, 4, Limits(tile=32))
    assert tiled.shape == (1, 3, 160, 288)
    corner = network(lr[:, :, :32, :32])[:, :, :32, :32]
    torch.testing.assert_close(tiled[:, :, :32, :32], corner, rtol=1e-10, atol=1e-11)


def test_tiles_of_several_images_share_batches(pixel) -> None:
    """Two images of six tiles each: the batches do not end where an image ends, and every tile is in one of them."""
    network, *_ = pixel
    lr = image(40, 72, batch=2)
    sizes: list[int] = []

    def part(name: str, x: Tensor, fixed: bool) -> Tensor:
        assert (name, fixed, tuple(x.shape[2:])) == ("network", True, (32, 32))
        sizes.append(len(x))
        return network(x)

    together = restore(network, lr, 4, Limits(tile=32, tile_batch=8), part)
    assert sizes == [8, 4]
    for i in range(2):
        alone = restore(network, lr[i : i + 1], 4, Limits(tile=32))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-12, atol=1e-12)


def test_memory_bounds_the_batches_of_tiles(pixel) -> None:
    network, *_ = pixel
    sizes: list[int] = []

    def part(name: str, x: Tensor, fixed: bool) -> Tensor:
        sizes.append(len(x))
        return network(x)

    restore(network, image(40, 72), 4, Limits(tile=32, tile_batch=8, pixels=3 * 32 * 32), part)
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (17, 40), (31, 70), (64, 64), (90, 9)])
def test_pieces_are_the_calls_of_parts(pixel, tinysr, size: tuple[int, int]) -> None:
    """What progress counts on is what runs, for both kinds of networks, whole and in tiles."""
    for network, limits in (
        (pixel[0], Limits()),
        (pixel[0], Limits(tile=16)),
        (pixel[0], Limits(pixels=900)),
        (tinysr[0], Limits(vae_core=4)),
        (tinysr[0], Limits()),
    ):
        calls = 0

        def part(name: str, x: Tensor, fixed: bool, network=network) -> Tensor:
            nonlocal calls
            calls += len(x)
            return tiled_inference.part_of(network, name)(x)

        restore(network, image(*size), 4, limits, part)
        whole = tiled_inference.in_one_piece(network, *size, 4, limits)
        assert tiled_inference.pieces(network, *size, 4, limits) == (1 if whole else calls)


def test_a_pixel_network_has_one_factor(pixel, tinysr) -> None:
    with pytest.raises(InputError, match="enlarges by 4"):
        use_upscale(pixel[0], 2)
    with pytest.raises(InputError, match="1 to 16"):
        use_upscale(tinysr[0], 17)
