"""Stable Diffusion's UNet and VAE in plain PyTorch against diffusers' own, at small sizes in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.sd_unet import SDUNet, sd_unet_shapes, time_features

pytestmark = pytest.mark.numeric
diffusers = pytest.importorskip("diffusers")
HEADS = (2, 4, 3)
WIDTHS = (8, 16, 24)


class ExactTime(nn.Module):
    """diffusers' time features evaluate angles of up to 999 in float32, uncertain by 6e-5 each."""

    def forward(self, t: Tensor) -> Tensor:
        return time_features(WIDTHS[0], float(t[0]), torch.empty(0, dtype=torch.float64)).expand(len(t), -1)


def randomize(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            scale = 0.5 if value.ndim == 1 else value[0].numel() ** -0.5
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
    return module.double().eval().requires_grad_(False)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def unets() -> tuple[SDUNet, nn.Module]:
    theirs = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=WIDTHS,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=HEADS,  # which says how many heads there are
        cross_attention_dim=12,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    randomize(theirs, 0)
    ours = SDUNet(sd_unet_shapes(WIDTHS, 2, (True, True, False), prompt=12), HEADS, 4).double()
    ours.load_state_dict(theirs.state_dict())
    theirs.time_proj = ExactTime()
    return ours.requires_grad_(False), theirs


@pytest.mark.parametrize("size", [(8, 12), (9, 7), (5, 10), (6, 3)], ids=str)
def test_unet_against_diffusers(size: tuple[int, int]) -> None:
    """Odd sides too, which are rounded up on the way down and cropped on the way up."""
    ours, theirs = unets()
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 4, *size, generator=generator, dtype=torch.float64)
    prompt = torch.randn(1, 5, 12, generator=generator, dtype=torch.float64)
    wanted = theirs(z, 999, prompt.expand(2, -1, -1)).sample
    assert relative(ours(z, 999.0, prompt), wanted) < 1e-12
    assert relative(ours(z, 998.0, prompt), wanted) > 1e-4


def test_time_features_are_diffusers() -> None:
    wanted = diffusers.models.embeddings.get_timestep_embedding(
        torch.tensor([999.0]), 8, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    assert float((time_features(8, 999.0, wanted) - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("quant", [False, True])
def test_vae_against_diffusers(quant: bool) -> None:
    levels = (8, 8, 16)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=levels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
    )
    randomize(theirs, 2)
    ours = KLVAE(kl_vae_shapes(levels, 4, 2, quant), kl_config(4)).double()
    ours.load_state_dict(theirs.state_dict())
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(2, 3, 20, 12, generator=generator, dtype=torch.float64) * 2 - 1
    z = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
    posterior = theirs.encode(image).latent_dist
    mean, log_variance = ours.moments(image)
    assert relative(mean, posterior.mean) < 1e-12
    assert relative(log_variance, posterior.logvar) < 1e-12
    assert relative(ours.decode(z), theirs.decode(z).sample) < 1e-12
