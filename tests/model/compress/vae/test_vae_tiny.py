"""The tiny VAE that is started from a KL VAE."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from model.compress.vae.prune import prune_kl, remove_attention
from model.compress.vae.separable import separable_state
from model.compress.vae.tiny import fit_last, tiny_from_kl
from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.tiny_vae import TinyVAE
from tests.layouts.weights import fill, fill_tiny, random_image
from tinysr_kernels.families import TinySRConfig

CONFIG = TinySRConfig(encoder_blocks=(1, 2), decoder_blocks=(2, 1))


def vae(channels: tuple[int, ...], groups: int = 4) -> KLVAE:
    """A KL VAE whose blocks change their streams little, as trained ones do."""
    network = KLVAE(kl_vae_shapes(channels, 4, 1), kl_config(groups)).double()
    fill(network, 0)
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "conv2.weight" in name:
                value.mul_(0.3)
    return network


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float((found - wanted).norm() / (wanted - wanted.mean(dim=(0, 2, 3), keepdim=True)).norm())


def test_the_start_is_nearer_to_the_teacher_than_fitting_its_last_layer_alone() -> None:
    images = random_image(32, 32, count=6).double() * 2 - 1
    fresh = random_image(32, 32, count=2, seed=9).double() * 2 - 1
    pruned = prune_kl(vae((16, 16)), 8, images)
    tiny = tiny_from_kl(pruned, CONFIG, images)
    random = TinyVAE.regular(width=8, latent_channels=4, config=CONFIG)
    fill_tiny(random.encoder, 1)
    fill_tiny(random.decoder, 2)
    random.double()
    z, wanted = pruned.encode(images), pruned.encode(fresh)
    fit_last(random.encoder.layers, (images + 1) / 2, z)
    fit_last(random.decoder.layers, torch.tanh(z / 3) * 3, (pruned.decode(z) + 1) / 2)
    assert relative(tiny.encode(fresh), wanted) < relative(random.encode(fresh), wanted)
    assert relative(tiny.decode(wanted), pruned.decode(wanted)) < relative(random.decode(wanted), pruned.decode(wanted))
    assert tiny.state_dict().keys() >= random.state_dict().keys()
    separable = TinyVAE.from_state(separable_state(tiny.state_dict()), CONFIG, torch.float64)
    assert torch.isfinite(separable.encode(fresh)).all()


def test_activations_aside_the_blocks_are_the_teachers() -> None:
    """With SiLU in place of ReLU, and constant statistics, the decoder's middle is reproduced exactly."""
    network = vae((8, 8))
    network = KLVAE.from_state(remove_attention(network.state_dict()), network.config)
    images = random_image(16, 16).double() * 2 - 1
    tiny = tiny_from_kl(network, CONFIG, images)
    z = network.encode(images)
    source, layers = network.decoder, tiny.decoder.layers
    x = source.conv_in(z)
    # Two blocks of the first stage: the last two of mid_block.0, mid_block.1, up_blocks.0.{0,1}.
    for resnet in source.mid_block.resnets:
        x = resnet(x)
    shift = layers[0].bias - source.conv_in.bias
    found = x + shift[:, None, None]
    for block, resnet in zip(layers[2:4], source.up_blocks[0].resnets, strict=True):
        x = resnet(x)
        convs = [module for module in block.conv if isinstance(module, nn.Conv2d)]
        hidden = convs[1](nn.functional.silu(convs[0](found)))
        found = found + convs[2](nn.functional.silu(hidden))
        assert torch.allclose(found, x + shift[:, None, None], atol=1e-6)


def test_widths_and_levels_must_fit() -> None:
    images = random_image(16, 16).double()
    with pytest.raises(ValueError, match="one width; prune to one first"):
        tiny_from_kl(vae((8, 16)), CONFIG, images)
    with pytest.raises(ValueError, match="3 levels cannot become"):
        tiny_from_kl(vae((8, 8, 8)), CONFIG, images)
