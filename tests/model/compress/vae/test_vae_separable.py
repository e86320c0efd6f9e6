"""Separable convolutions initialized from dense ones: exact where they can be, otherwise the best there is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.compress.vae.separable import dense_of, separable_state, separate
from model.reference.tiny_vae import TinyVAE
from tests.layouts.weights import fill
from tinysr_kernels.families import TinySRConfig


def error(weight: Tensor, depthwise: Tensor, pointwise: Tensor) -> float:
    return float((weight - dense_of(depthwise, pointwise)).square().sum())


def alternating(weight: Tensor, rounds: int, seed: int) -> float:
    """Alternating least squares from a random start: the error it arrives at."""
    outputs, inputs = weight.shape[:2]
    kernels = weight.permute(1, 0, 2, 3).reshape(inputs, outputs, 9)
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(inputs, 9, generator=generator, dtype=weight.dtype)
    for _ in range(rounds):
        p = torch.einsum("iok,ik->io", kernels, d) / d.square().sum(1, keepdim=True)
        d = torch.einsum("iok,io->ik", kernels, p) / p.square().sum(1, keepdim=True)
    return error(weight, d.reshape(inputs, 1, 3, 3), p.T[:, :, None, None])


@pytest.mark.parametrize(("outputs", "inputs"), [(12, 7), (5, 16), (1, 3)])
def test_the_approximation_is_optimal(outputs: int, inputs: int) -> None:
    weight = torch.randn(outputs, inputs, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    depthwise, pointwise = separate(weight)
    best = error(weight, depthwise, pointwise)
    for seed in range(3):
        assert best <= alternating(weight, 500, seed) * (1 + 1e-9) + 1e-24
        noise = torch.Generator().manual_seed(seed)
        moved = depthwise + 1e-3 * torch.randn(depthwise.shape, generator=noise, dtype=weight.dtype)
        assert best <= error(weight, moved, pointwise) + 1e-12
    # The error that is left is what the smaller singular values hold.
    values = torch.linalg.svdvals(weight.permute(1, 0, 2, 3).reshape(inputs, outputs, 9))
    assert best == pytest.approx(float(values[:, 1:].square().sum()), rel=1e-9, abs=1e-12)
    assert torch.allclose(depthwise.flatten(1).norm(dim=1), pointwise[:, :, 0, 0].norm(dim=0))


def test_a_separable_kernel_comes_back() -> None:
    depthwise = torch.randn(6, 1, 3, 3, dtype=torch.float64)
    pointwise = torch.randn(9, 6, 1, 1, dtype=torch.float64)
    weight = dense_of(depthwise, pointwise)
    found = separate(weight)
    assert torch.allclose(dense_of(*found), weight)
    x = torch.randn(2, 6, 8, 7, dtype=torch.float64)
    wanted = F.conv2d(x, weight, stride=2, padding=1)
    assert torch.allclose(F.conv2d(F.conv2d(x, found[0], stride=2, padding=1, groups=6), found[1]), wanted)


def test_a_dead_channel_stays_finite() -> None:
    weight = torch.zeros(4, 3, 3, 3)
    assert all(torch.isfinite(t).all() for t in separate(weight))


def test_a_whole_vae_becomes_separable() -> None:
    config = TinySRConfig(encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    dense = TinyVAE.regular(width=8, latent_channels=4, config=config)
    fill(dense, 0)
    state = separable_state(dense.state_dict(), keep=("decoder.layers.6",))
    separable = TinyVAE.from_state(state, config)
    assert "decoder.layers.6.weight" in state
    assert "encoder.layers.0.depthwise.weight" in state
    assert separable.encoder.layers[0].pointwise.bias is not None
    assert separable_state(state, keep=("decoder.layers.6",)).keys() == state.keys()
