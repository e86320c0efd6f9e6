"""The pruned KL decoder against diffusers' AutoencoderKL decoder at small size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from model.reference.kl_decoder import KLDecoder
from model.reference.unet_shapes import decoder_shapes
from tinysr_kernels.families import UNetConfig

pytestmark = pytest.mark.numeric
vae = pytest.importorskip("diffusers.models.autoencoders.vae")

CONFIG = UNetConfig(groups=(4, 2, 1))
CHANNELS = (8, 12, 16, 20)


def theirs(layers: int = 2) -> nn.Module:
    """diffusers' decoder, every parameter random."""
    torch.manual_seed(0)
    decoder = vae.Decoder(
        in_channels=4,
        out_channels=3,
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=layers,
        norm_num_groups=4,
    )
    for value in decoder.parameters():
        nn.init.normal_(value, 0.0, 0.5 if value.ndim == 1 else value[0].numel() ** -0.5)
    return decoder.eval()


def own_state(decoder: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in decoder.state_dict().items() if not name.startswith("conv_in.")}


@pytest.mark.parametrize("layers", [1, 2])
def test_against_diffusers(layers: int) -> None:
    decoder = theirs(layers)
    state = own_state(decoder)
    assert {k: tuple(v.shape) for k, v in state.items()} == decoder_shapes(CHANNELS, layers + 1)
    ours = KLDecoder.from_state(state, CONFIG)
    z = torch.randn(2, 4, 3, 5)
    with torch.no_grad():
        wanted = decoder(z)
        found = ours(decoder.conv_in(z))
    assert found.shape == (2, 3, 24, 40)
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_separable_without_attention() -> None:
    shapes = decoder_shapes((4, 8), 1, separable=True, attention=False)
    decoder = KLDecoder(shapes, CONFIG)
    assert {k: tuple(v.shape) for k, v in decoder.state_dict().items()} == shapes
    assert decoder(torch.randn(1, 8, 4, 6)).shape == (1, 3, 8, 12)


def test_middle_of_a_single_resnet() -> None:
    shapes = {k: v for k, v in decoder_shapes((4, 8), 1).items() if not k.startswith("mid_block.resnets.1")}
    decoder = KLDecoder(shapes, CONFIG)
    assert len(decoder.mid_block.resnets) == 1
    assert decoder(torch.randn(1, 8, 2, 3)).shape == (1, 3, 4, 6)


def test_a_missing_tensor_is_named() -> None:
    state = own_state(theirs())
    del state["mid_block.attentions.0.to_k.weight"]
    with pytest.raises(KeyError, match="weight"):
        KLDecoder.from_state(state, CONFIG)
    state = own_state(theirs()) | {"foreign": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="foreign"):
        KLDecoder.from_state(state, CONFIG)
