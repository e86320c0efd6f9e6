"""SD3's joint transformer and AutoencoderKL in plain PyTorch against diffusers' own, at small sizes."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.sd3_transformer import SD3Config, SD3Transformer, crop_table
from model.reference.tinysr_dit import timestep_embedding

pytestmark = pytest.mark.numeric
diffusers = pytest.importorskip("diffusers")

CONFIG = SD3Config(
    sample_size=16,
    in_channels=4,
    num_layers=3,
    attention_head_dim=8,
    num_attention_heads=4,
    joint_attention_dim=12,
    caption_projection_dim=32,
    pooled_projection_dim=20,
    out_channels=4,
    pos_embed_max_size=12,
)


def randomize(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            scale = 0.5 if value.ndim == 1 else value[0].numel() ** -0.5
            value.copy_(torch.randn(value.shape, generator=generator) * scale)


@pytest.mark.parametrize("layers", [1, 3])
def test_transformer_against_diffusers(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CONFIG, num_layers=layers)
    theirs = diffusers.SD3Transformer2DModel(**asdict(config)).double().eval()
    randomize(theirs, 0)
    ours = SD3Transformer(config).double()
    ours.load_state_dict(theirs.state_dict())
    # diffusers evaluates the time step's angles, up to 1000, in float32: uncertain by 6e-5 each.
    embed = theirs.time_text_embed.time_proj
    assert torch.allclose(embed(torch.tensor([1000.0])).double(), timestep_embedding().double(), atol=1e-4)
    monkeypatch.setattr(embed, "forward", lambda time: timestep_embedding().double().expand(len(time), -1))
    z, prompt, pooled = (torch.randn(s, dtype=torch.float64) for s in ((2, 4, 12, 8), (1, 5, 12), (1, 20)))
    time = torch.full((2,), 1000.0, dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(z, prompt.expand(2, -1, -1), pooled.expand(2, -1), time).sample
        found = ours(z, prompt, pooled)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-12
    assert diffusers.SD3Transformer2DModel.from_config(ours.config_json()).config.num_layers == layers


def test_the_table_is_cropped_in_the_middle() -> None:
    table = torch.arange(36.0).reshape(1, 36, 1)
    assert crop_table(table, 2, 4).flatten().tolist() == [13, 14, 15, 16, 19, 20, 21, 22]
    with pytest.raises(ValueError, match="no 7x2 positions"):
        crop_table(table, 7, 2)


@pytest.mark.parametrize("layers", [1, 2])
def test_vae_against_diffusers(layers: int) -> None:
    channels = (8, 12, 16)
    theirs = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    randomize(theirs, 1)
    state = theirs.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == kl_vae_shapes(channels, 4, layers)
    ours = KLVAE.from_state(state, kl_config(4))
    image, z = torch.randn(2, 3, 16, 24), torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        wanted, decoded = theirs.encode(image).latent_dist.mean, theirs.decode(z).sample
        assert float((ours.encode(image) - wanted).abs().max() / wanted.abs().max()) < 1e-5
        assert float((ours.decode(z) - decoded).abs().max() / decoded.abs().max()) < 1e-5
