"""The fused networks against the reference networks: the same function, with every constant folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.kl_decoder import KLDecoder
from model.reference.pruned_unet import PrunedUNet
from model.reference.tiny_vae import TinyVAE
from model.reference.tinysr_dit import TinySRTransformer
from model.reference.unet_shapes import decoder_shapes, unet_shapes
from tinysr_kernels.families import TinySRConfig, UNetConfig, build, fold
from tinysr_kernels.nets import place

pytestmark = pytest.mark.numeric
CPU = torch.device("cpu")
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights whose outputs stay of order one, norm weights around one, every bias in play."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 1
        gain = 0.2 if parameter.dim() == 1 else 1 / fan**0.5
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * gain
        center = 1.0 if "norm" in name and name.endswith("weight") and parameter.dim() == 1 else 0.0
        parameter.data = (noise + center).to(parameter.dtype)
    return module.double().requires_grad_(False)


def compiled(family: Any, config: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> Any:
    return build(family, config, place(fold(family, config, tensors, dtype), CPU, dtype))


def tinysr_parts(separable_decoder: bool, gate_scale: float = 1.0) -> tuple[TinySRTransformer, TinyVAE, TinySRConfig]:
    config = TinySRConfig(head_dim=16, encoder_blocks=(1, 2, 1, 1), decoder_blocks=(1, 1, 2, 1), scaling_factor=0.7)
    transformer = TinySRTransformer(
        dim=48, layers=2, head_dim=16, channels=4, pooled_dim=24, table=4, sample_size=8, pos_embed_max_size=8
    )
    randomise(transformer)
    generator = torch.Generator().manual_seed(5)
    transformer.cache_modulation(pooled=torch.randn((1, 24), generator=generator, dtype=torch.float64))
    for block in transformer.transformer_blocks:
        block.gate_msa *= gate_scale
    vae = TinyVAE.regular(
        width=10, latent_channels=4, config=config, separable_encoder=True, separable_decoder=separable_decoder
    )
    randomise(vae, 1)
    return transformer, vae, config


@dtypes
@pytest.mark.parametrize("separable_decoder", [False, True], ids=["dense decoder", "separable decoder"])
@pytest.mark.parametrize("gate_scale", [1.0, 1e-6], ids=["gates folded", "gates kept"])
def test_tinysr_equals_its_reference(separable_decoder: bool, gate_scale: float, dtype: torch.dtype) -> None:
    transformer, vae, config = tinysr_parts(separable_decoder, gate_scale)
    tensors = transformer.normalized_state() | vae.state_dict()
    network = compiled("tinysr-dit", config, tensors, dtype)
    assert (network.transformer.blocks[0].out.gate is None) == (gate_scale == 1.0)
    image = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    latent = vae.encode(image * 2 - 1) * config.scaling_factor
    assert relative(network.encoder(image.to(dtype)), latent) < BOUNDS[dtype]
    clean = latent - transformer(latent)
    assert relative(network.transformer(latent.to(dtype)), clean) < BOUNDS[dtype]
    restored = vae.decode(clean / config.scaling_factor) / 2 + 0.5
    assert relative(network.decoder(clean.to(dtype)), restored) < BOUNDS[dtype]
    assert relative(network(image.to(dtype)), restored) < BOUNDS[dtype]


UNETS = {
    "adcsr": (UNetConfig(head_dim=6, groups=(6, 5, 4, 2, 1)), {"separable": False, "transformers": (True, False)}),
    "separable": (UNetConfig(head_dim=6, residual="bicubic"), {"separable": True}),
    "time bias": (
        UNetConfig(head_dim=6, unshuffle=1),
        {"separable": True, "transformers": (True, True), "time_bias": True},
    ),
}


def unet_parts(name: str) -> tuple[PrunedUNet, KLDecoder, UNetConfig]:
    config, options = UNETS[name]
    separable = bool(options["separable"])
    inputs = 3 * config.unshuffle**2
    unet = PrunedUNet(unet_shapes(inputs, 20, [12, 30], 2, **options), config)
    ups = 4 * config.unshuffle
    widths = [12, 20, 20, 20] if ups == 8 else [12, 20, 20]
    decoder = KLDecoder(decoder_shapes(widths, 2, separable=separable, attention=True), config)
    randomise(unet, 3)
    randomise(decoder, 4)
    return unet, decoder, config


@dtypes
@pytest.mark.parametrize("name", UNETS)
def test_pruned_unet_equals_its_reference(name: str, dtype: torch.dtype) -> None:
    unet, decoder, config = unet_parts(name)
    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    network = compiled("tinysr-unet", config, tensors, dtype)
    assert network.upscale == 4
    image = torch.rand((2, 3, 12, 8), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = image * 2 - 1
    expected = decoder(unet(F.pixel_unshuffle(x, config.unshuffle)))
    if config.residual == "bicubic":
        expected = expected + F.interpolate(x, scale_factor=4, mode="bicubic", align_corners=False)
    expected = expected / 2 + 0.5
    assert relative(network(image.to(dtype)), expected) < BOUNDS[dtype]


@dtypes
@pytest.mark.parametrize("tiny_decoder", [False, True], ids=["KL decoder", "tiny decoder"])
@pytest.mark.parametrize("prediction", ["direct", "subtract"])
@pytest.mark.parametrize("residual", ["none", "bicubic"])
def test_vae_input_equals_its_reference(tiny_decoder: bool, prediction: Any, residual: Any, dtype: torch.dtype) -> None:
    """encode * scale -> unet -> (z -) prediction -> decode(/ scale) -> + bicubic, from the definition of the family."""
    config = UNetConfig(
        input="vae", prediction=prediction, residual=residual, scaling_factor=1.3, encoder_blocks=(1, 1, 1, 1),
        decoder_blocks=(1, 1, 1, 1),
    )  # fmt: skip
    vae = TinyVAE.regular(width=8, latent_channels=4, config=config, separable_encoder=True)
    unet = PrunedUNet(unet_shapes(4, 4, [8, 12], 1, separable=True), config)
    kl = KLDecoder(decoder_shapes([4, 4, 4, 4], 1, separable=True, attention=False), config)
    for seed, module in enumerate((vae, unet, kl)):
        randomise(module, seed)
    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {k: v for k, v in vae.state_dict().items() if tiny_decoder or k.startswith("encoder.")}
    if not tiny_decoder:
        tensors |= {f"decoder.{k}": v for k, v in kl.state_dict().items()}
    network = compiled("tinysr-unet", config, tensors, dtype)
    assert (network.upscale, network.multiple) == (4, 4)

    image = torch.rand((1, 3, 16, 12), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    enlarged = F.interpolate(image * 2 - 1, scale_factor=4, mode="bicubic", align_corners=False)
    z = vae.encode(enlarged) * config.scaling_factor
    z = unet(z) if prediction == "direct" else z - unet(z)
    expected = (vae.decode if tiny_decoder else kl)(z / config.scaling_factor)
    if residual == "bicubic":
        expected = expected + enlarged
    assert relative(network(image.to(dtype)), expected / 2 + 0.5) < BOUNDS[dtype]


def test_a_vector_stays_wide_and_a_matrix_is_rounded() -> None:
    unet, decoder, config = unet_parts("separable")
    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    folded = place(fold("tinysr-unet", config, tensors, torch.float16), CPU, torch.float16)
    kinds = {name: tensor.dtype for name, tensor in folded.items()}
    assert kinds["unet.down_blocks.0.resnets.0.conv1.pointwise"] == torch.float16
    assert kinds["unet.down_blocks.0.resnets.0.conv1.depthwise"] == torch.float32
    assert kinds["unet.conv_norm_out.weight"] == torch.float32
    assert kinds["unet.conv_in.weight"] == torch.float16
    assert folded["unet.conv_in.weight"].is_contiguous(memory_format=torch.channels_last)


def test_half_precision_follows_the_reference() -> None:
    """A float16 network stays as near to the float64 reference as the eager reference network in bfloat16 does."""
    unet, decoder, config = unet_parts("adcsr")
    tensors = {f"unet.{k}": v for k, v in unet.state_dict().items()}
    tensors |= {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    image = torch.rand((1, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = decoder(unet(F.pixel_unshuffle(image * 2 - 1, 2)))
    for dtype in (torch.float16, torch.bfloat16):
        network = compiled("adcsr", config, tensors, dtype)
        x = F.pixel_unshuffle(image.to(dtype) * 2 - 1, 2)
        eager = decoder.to(dtype)(unet.to(dtype)(x))
        ours = relative(network(image.to(dtype)) * 2 - 1, expected)
        assert ours < 2 * relative(eager, expected)
