"""Padding, windows and halos: sizes, exact tiling, blending that leaves a constant alone."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tinysr_kernels.nets.tiny_vae import Decoder, Encoder, halo
from tinysr_kernels.nets.windows import batch_sizes, batched, blend_windows, gaussian_window, window_starts
from tinysr_kernels.runtime.tiles.tiling import (
    apply_with_halo,
    halo_windows,
    pad_sides,
    pad_to,
    ramp_window,
)


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 2, 16]), st.sampled_from([1, 16, 128]))
def test_padded_sides_are_the_smallest_allowed(height: int, width: int, multiple: int, minimum: int) -> None:
    for side, padded in zip((height, width), pad_sides(height, width, multiple, minimum), strict=True):
        assert padded % multiple == 0
        assert padded >= max(side, minimum)
        assert padded - multiple < max(side, minimum)


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 60), st.integers(0, 60))
def test_padding_keeps_the_image_and_mirrors_it(height: int, width: int, below: int, right: int) -> None:
    image = torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(0))
    padded = pad_to(image, height + below, width + right)
    assert padded.shape == (1, 3, height + below, width + right)
    assert torch.equal(padded[:, :, :height, :width], image)
    if 0 < right < width:
        assert torch.equal(padded[:, :, :height, width:], image.flip(3)[:, :, :, 1 : right + 1])
    elif right:
        assert torch.equal(padded[:, :, :height, width:], image[:, :, :, -1:].expand(1, 3, height, right))


@given(st.integers(1, 1000), st.integers(1, 128), st.integers(0, 64))
def test_windows_cover_everything_in_order(length: int, window: int, overlap: int) -> None:
    overlap = min(overlap, window - 1)
    found = window_starts(length, window, overlap)
    assert found[0] == 0
    if length <= window:
        assert found == [0]
        return
    assert found[-1] == length - window
    assert found[:-1] == [i * (window - overlap) for i in range(len(found) - 1)]
    assert all(0 < b - a <= window - overlap for a, b in itertools.pairwise(found))


def test_gaussian_weights_follow_the_formula() -> None:
    side = 16
    weights = gaussian_window(side, torch.float64, torch.device("cpu"))
    for y, x in ((0, 0), (3, 11), (15, 15), (8, 7)):
        column = math.exp(-(((y - side / 2) / side) ** 2) / 0.02) / math.sqrt(0.02 * math.pi)
        row = math.exp(-(((x - (side - 1) / 2) / side) ** 2) / 0.02) / math.sqrt(0.02 * math.pi)
        assert weights[y, x].item() == pytest.approx(column * row, rel=1e-14)


def test_blending_restores_a_pointwise_function() -> None:
    """What does not depend on the neighborhood is the same in windows as on the whole, whatever the weights."""
    x = torch.rand((2, 3, 37, 50), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = []

    def double_size(tile: torch.Tensor) -> torch.Tensor:
        seen.append(len(tile))
        return F.interpolate(tile, scale_factor=2, mode="nearest").square()

    weights = ramp_window(32, 48, 8, torch.float64, x.device)
    blended = blend_windows(x, (16, 24), 4, weights, 2, 3, double_size)
    assert max(seen) <= 3
    torch.testing.assert_close(blended, double_size(x), rtol=1e-13, atol=0)


def _random_folded(network_blocks: tuple[int, ...], decoder: bool) -> dict[str, torch.Tensor]:
    from model.reference.tiny_vae import TinyVAE
    from tinysr_kernels.families import TinySRConfig
    from tinysr_kernels.nets import tiny_vae

    torch.manual_seed(0)
    config = TinySRConfig(encoder_blocks=network_blocks, decoder_blocks=network_blocks[::-1])
    vae = TinyVAE.regular(width=6, latent_channels=4, config=config, separable_encoder=True).double()
    state = {k: v.detach() for k, v in vae.state_dict().items()}
    if decoder:
        return dict(tiny_vae.fold_decoder(state, torch.float64, network_blocks[::-1]))
    return dict(tiny_vae.fold_encoder(state, torch.float64, network_blocks, 1.0))


@pytest.mark.parametrize("blocks", [(1, 1, 1), (1, 2, 1, 1)])
def test_the_vae_gives_the_same_in_tiles(blocks: tuple[int, ...]) -> None:
    encoder = Encoder(_random_folded(blocks, False), blocks)
    decoder = Decoder(_random_folded(blocks, True), blocks[::-1], 1.0)
    reach, factor = halo(blocks), encoder.factor
    image = torch.rand((2, 3, (2 * reach + 9) * factor, (2 * reach + 3) * factor), dtype=torch.float64)
    shapes = set()

    def spy(network: torch.nn.Module):
        def run(x: torch.Tensor) -> torch.Tensor:
            shapes.add(tuple(x.shape))
            return network(x)

        return run

    with torch.inference_mode():
        z = encoder(image)
        tiled = apply_with_halo(image, 2, reach, factor, 1, 2, spy(encoder))
        torch.testing.assert_close(tiled, z, rtol=1e-12, atol=1e-12)
        whole = decoder(z)
        again = apply_with_halo(z, 2, reach, 1, factor, 2, spy(decoder))
        torch.testing.assert_close(again, whole, rtol=1e-12, atol=1e-12)
    side = 2 + 2 * reach  # every tile has this side, at the border too
    assert {shape[0] for shape in shapes} == {2}
    assert {shape[2:] for shape in shapes} == {(side, side), (side * factor, side * factor)}


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 30))
def test_windows_with_a_halo_keep_everything_once_and_at_a_distance(length: int, core: int, reach: int) -> None:
    side = core + 2 * reach
    end = 0
    for begin, stop, read in halo_windows(length, core, reach):
        assert begin == end
        assert begin < stop
        assert read >= 0
        assert read == 0 or (begin - read >= reach and read + side <= length)
        assert stop == length or read + side - stop >= reach
        end = stop
    assert end == length


@given(st.integers(0, 100), st.sampled_from([1, 2, 3, 8]))
def test_batches_come_in_few_sizes(count: int, most: int) -> None:
    sizes = batch_sizes(count, most)
    assert sum(sizes) == count
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) <= {most, 1, 2, 4}
    assert [list(group) for group in batched(list(range(count)), most)] == [
        list(range(sum(sizes[:i]), sum(sizes[: i + 1]))) for i in range(len(sizes))
    ]


def test_a_smaller_halo_would_not_do() -> None:
    """The reach is not padded out of caution: three latent pixels less make a difference."""
    blocks = (1, 1, 1)
    encoder = Encoder(_random_folded(blocks, False), blocks)
    image = torch.rand((1, 3, 16, 32 * encoder.factor), dtype=torch.float64)
    with torch.inference_mode():
        short = apply_with_halo(image, 8, halo(blocks) - 3, encoder.factor, 1, 1, encoder)
        assert not torch.allclose(short, encoder(image), rtol=1e-12, atol=1e-12)
