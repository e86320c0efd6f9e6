"""The reference tiny VAE against diffusers' AutoencoderTiny, separable convolutions against dense."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from model.reference.pruned_unet import SeparableConv, convolution
from model.reference.tiny_vae import TinyVAE, conv_shapes, decoder_steps, encoder_steps
from tests.layouts.weights import fill, fill_tiny, random_image
from tinysr_kernels.families import TinySRConfig

pytestmark = pytest.mark.numeric
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
OTHER = TinySRConfig(encoder_blocks=(2, 1, 1), decoder_blocks=(1, 2, 1))
RELEASED = TinySRConfig()


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.dtype == expected.dtype
    return float((found - expected).norm() / expected.norm())


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(config: TinySRConfig = RELEASED, *, encoder: bool = False, decoder: bool = False) -> TinyVAE:
    vae = TinyVAE.regular(width=12, config=config, separable_encoder=encoder, separable_decoder=decoder)
    fill_tiny(vae.encoder, 1)
    fill_tiny(vae.decoder, 2)
    return vae


@dtypes
@pytest.mark.parametrize("config", [RELEASED, OTHER], ids=["released", "other"])
def test_against_diffusers(dtype: torch.dtype, config: TinySRConfig) -> None:
    ours = filled(config)
    theirs = AutoencoderTiny(
        encoder_block_out_channels=(12,) * len(config.encoder_blocks),
        decoder_block_out_channels=(12,) * len(config.decoder_blocks),
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
        latent_channels=16,
    )
    theirs.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(dtype), theirs.to(dtype).requires_grad_(False)
    image = random_image(40, 24, count=2, dtype=dtype) * 2 - 1
    # Latents beyond the +-3 at which the decoder's tanh bends them.
    z = randn(2, 16, 5, 3, dtype=dtype) * 3
    assert relative(ours.encode(image), theirs.encode(image).latents) < BOUNDS[dtype]
    assert relative(ours.decode(z), theirs.decode(z).sample) < BOUNDS[dtype]


def test_released_layer_numbers() -> None:
    """The public keys' numbering."""
    encoder, decoder = dict(_by_number(encoder_steps((1, 3, 3, 3)))), dict(_by_number(decoder_steps((3, 3, 3, 1))))
    assert [n for n, kind in encoder.items() if kind == "down"] == [2, 6, 10]
    assert [n for n, kind in encoder.items() if kind == "conv"] == [0, 14]
    assert [n for n, kind in encoder.items() if kind == "block"] == [1, 3, 4, 5, 7, 8, 9, 11, 12, 13]
    assert [n for n, kind in decoder.items() if kind == "relu"] == [1]
    assert [n for n, kind in decoder.items() if kind == "up"] == [5, 10, 15]
    assert [n for n, kind in decoder.items() if kind == "conv"] == [0, 6, 11, 16, 18]
    assert [n for n, kind in decoder.items() if kind == "block"] == [2, 3, 4, 7, 8, 9, 12, 13, 14, 17]


def _by_number(steps: object) -> list[tuple[int, str]]:
    return [(number, kind) for kind, number in steps]


def test_which_layers_have_a_bias() -> None:
    state = filled(encoder=True).state_dict()
    for layer in (2, 6, 10):
        assert f"encoder.layers.{layer}.pointwise.bias" not in state
    for layer in (6, 11, 16):
        assert f"decoder.layers.{layer}.bias" not in state
    for name in ("encoder.layers.0.pointwise", "encoder.layers.3.conv.4.pointwise", "encoder.layers.14.pointwise"):
        assert f"{name}.bias" in state
    for name in ("decoder.layers.0", "decoder.layers.7.conv.0", "decoder.layers.18"):
        assert f"{name}.bias" in state
    assert not [name for name in state if name.endswith("depthwise.bias")]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_separable_convolution_is_a_dense_one(stride: int, bias: bool) -> None:
    """pointwise(depthwise(x)) = dense(x) with W[o,c] = P[o,c] D[c], at the borders too."""
    separable = convolution(conv_shapes(7, 5, bias=bias, separable=True), stride)
    fill(separable, 1)
    separable.double()
    dense = convolution(conv_shapes(7, 5, bias=bias, separable=False), stride).double()
    with torch.no_grad():
        dense.weight.copy_(separable.pointwise.weight * separable.depthwise.weight[:, 0])
        if bias:
            dense.bias.copy_(separable.pointwise.bias)
        x = randn(2, 5, 9, 8)
        assert separable(x).shape == dense(x).shape
        assert relative(separable(x), dense(x)) < BOUNDS[torch.float64]
    assert ("pointwise.bias" in separable.state_dict()) == bias


def expanded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The dense VAE that a separable one equals."""
    dense = {}
    for name, tensor in state.items():
        if name.endswith("depthwise.weight"):
            pointwise = state[name.replace("depthwise", "pointwise")]
            dense[name.replace("depthwise.weight", "weight")] = pointwise * tensor[:, 0]
        elif not name.endswith("pointwise.weight"):
            dense[name.replace("pointwise.bias", "bias")] = tensor
    return dense


@pytest.mark.parametrize(("encoder", "decoder"), [(True, False), (True, True), (False, True)])
def test_separable_halves_are_dense_ones(encoder: bool, decoder: bool) -> None:
    separable = filled(encoder=encoder, decoder=decoder).double()
    dense = TinyVAE.from_state(expanded(separable.state_dict()), dtype=torch.float64)
    assert not any(isinstance(module, SeparableConv) for module in dense.modules())
    assert any(isinstance(module, SeparableConv) for module in separable.modules())
    image, z = random_image(16, 24, dtype=torch.float64) * 2 - 1, randn(1, 16, 3, 2)
    assert relative(separable.encode(image), dense.encode(image)) < BOUNDS[torch.float64]
    assert relative(separable.decode(z), dense.decode(z)) < BOUNDS[torch.float64]


def test_each_layer_is_decided_by_its_own_keys() -> None:
    """A VAE that is separable in single layers only: one encoder convolution, one inside a decoder block."""
    separable = filled(encoder=True, decoder=True).double().state_dict()
    chosen = ("encoder.layers.6.", "decoder.layers.8.conv.2.")
    mixed = {k: v for k, v in expanded(separable).items() if not k.startswith(chosen)}
    mixed |= {k: v for k, v in separable.items() if k.startswith(chosen)}
    vae = TinyVAE.from_state(mixed, dtype=torch.float64)
    found = {f"{name}." for name, module in vae.named_modules() if isinstance(module, SeparableConv)}
    assert found == set(chosen)
    assert vae.state_dict().keys() == mixed.keys()
    whole = TinyVAE.from_state(separable, dtype=torch.float64)
    image, z = random_image(16, 16, dtype=torch.float64) * 2 - 1, randn(1, 16, 2, 2)
    assert relative(vae.encode(image), whole.encode(image)) < BOUNDS[torch.float64]
    assert relative(vae.decode(z), whole.decode(z)) < BOUNDS[torch.float64]


def test_ranges() -> None:
    """Black is the encoder's zero, which its padding continues; tanh bounds what the decoder sees."""
    vae = filled(OTHER).double()
    black = torch.full((1, 3, 24, 24), -1.0, dtype=torch.float64)
    layers = nn.Sequential(*vae.encoder.layers)
    assert torch.equal(vae.encode(black), layers(torch.zeros_like(black)))
    z = torch.full((1, 16, 3, 3), 1e6, dtype=torch.float64)
    assert torch.equal(vae.decode(z), vae.decode(z * 10))
    assert torch.allclose(vae.decode(z), vae.decoder.layers(torch.full_like(z, 3.0)) * 2 - 1, rtol=1e-13)


def test_from_state_names_what_is_wrong() -> None:
    state = dict(filled().state_dict())
    with pytest.raises(KeyError, match="weight"):
        TinyVAE.from_state({k: v for k, v in state.items() if k != "decoder.layers.7.conv.2.weight"})
    with pytest.raises(RuntimeError, match=r"encoder\.layers\.15"):
        TinyVAE.from_state(state | {"encoder.layers.15.weight": torch.ones(3, 3)})
