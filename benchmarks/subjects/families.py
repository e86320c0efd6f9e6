"""What measurements need of each family beside the package: full-size shapes, the reference network, its peers.

The one place outside `tinysr_kernels/families/` where families are told apart; a family that is not in `SUBJECTS`
compiles like any other and is not measured.

TinySR: 12 blocks of width 1536, a VAE of 64 channels whose decoder is separable as in the paper or dense as the
release also has it, and that of the paper with its transformer in fp8. AdcSR: SD 2.1's UNet at 0.75 of its widths.
OSEDiff: SD 2.1's UNet and VAE with a prompt of 77 tokens. TSD-SR: SD3's transformer and VAE with a prompt of 333.
tinysr-unet: the checkpoint in the package, one of AdcSR's widths with separable convolutions, and two small ones of
widths that are awkward for kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from model.reference.kl_decoder import KLDecoder
from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.one_step.osediff import osediff
from model.reference.one_step.tsd_sr import tsd_sr
from model.reference.pipelines import tinysr, unet_sr
from model.reference.pruned_unet import PrunedUNet
from model.reference.sd3_transformer import SD3Config, SD3Transformer
from model.reference.sd_unet import SDUNet, sd_unet_shapes
from model.reference.tiny_vae import TinyVAE
from model.reference.tinysr_dit import BLOCK_MODULATION, OUT_MODULATION, TinySRTransformer
from model.reference.unet_shapes import Shape, decoder_shapes, unet_shapes
from tinysr_kernels.families import Config, OSEDiffConfig, TinySRConfig, TSDSRConfig, UNetConfig, load

META = torch.device("meta")
ADCSR_WIDTHS = (240, 480, 960, 960)
ADCSR_DECODER = (64, 128, 256, 256)
Named = tuple[Config, dict[str, Tensor]]
Parts = dict[str, nn.Module]


@dataclass(frozen=True)
class Bar:
    """One comparison with eager PyTorch on a CPU: of a variant, whole or of its VAE's halves; the least speedup."""

    variant: str
    least: float
    part: str = "whole"


@dataclass(frozen=True)
class Subject:
    """A family as a subject of measurements.

    variants: the networks it comes in, the one that counts first. shapes(variant, reduced): configuration and
    normalized checkpoint on meta tensors; reduced: the same structure at a size that a CPU runs in a moment.
    parts(tensors, config): the reference networks by name. enlarge(image, parts, config): the reference pipeline,
    [N,3,H,W] in [0,1] -> [N,3,4H,4W]. quantized: variants that are quantized, and how. pages: variants in docs/plan.md.
    bars: see `Bar`. lora: the part that is released with a LoRA. teachers: whether it is a student of the models in
    `teachers.py`, to be timed beside it.
    """

    variants: tuple[str, ...]
    shapes: Callable[[str, bool], Named]
    parts: Callable[[Mapping[str, Tensor], Any], Parts]
    enlarge: Callable[[Tensor, Mapping[str, Any], Any], Tensor]
    quantized: Mapping[str, str] = field(default_factory=dict)
    pages: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    lora: str | None = None
    teachers: bool = False


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors `prefix.*` without their prefix."""
    return {k.removeprefix(f"{prefix}."): t for k, t in tensors.items() if k.startswith(f"{prefix}.")}


# TinySR


def _tinysr_shapes(variant: str, reduced: bool) -> Named:
    """Images are 32x32 at least where it is reduced."""
    with META:
        transformer = (
            TinySRTransformer(cached=True, dim=256, layers=2, table=8) if reduced else TinySRTransformer(cached=True)
        )
        width = 16 if reduced else 64
        vae = TinyVAE.regular(width=width, separable_encoder=True, separable_decoder=variant != "dense")
        return TinySRConfig(), transformer.normalized_state() | vae.state_dict()


def _tinysr_parts(tensors: Mapping[str, Tensor], config: TinySRConfig) -> Parts:
    of_vae = {k: v for k, v in tensors.items() if not k.startswith("transformer.")}
    return {
        "transformer": TinySRTransformer.from_state(public_transformer(tensors), config),
        "vae": TinyVAE.from_state(of_vae, config),
    }


def _tinysr(image: Tensor, parts: Mapping[str, Any], config: TinySRConfig) -> Tensor:
    return tinysr(image, parts["transformer"], parts["vae"], config)


def public_transformer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """TinySR's transformer under its public names, with filled modulation buffers."""
    state = {}
    for name, t in under(tensors, "transformer").items():
        stem, _, last = name.rpartition(".")
        if last != "modulation":
            state[name] = t
        elif stem == "norm_out":
            state |= dict(zip(OUT_MODULATION, t.split(1), strict=True))
        else:
            state |= {f"{stem}.{buffer}": row for buffer, row in zip(BLOCK_MODULATION, t.split(1), strict=True)}
    return state


# AdcSR and tinysr-unet


def _adcsr_shapes(variant: str, reduced: bool) -> Named:
    if reduced:
        return _pixels(UNetConfig(), (48, 48, 96, 96), (16, 16, 32, 32), 2, separable=False)
    return _pixels(UNetConfig(), ADCSR_WIDTHS, ADCSR_DECODER, 2, separable=False)


def _unet_shapes(variant: str, reduced: bool) -> Named:
    """The demo is small as it is, and of the others none is run on a CPU."""
    if variant == "demo":
        checkpoint = load("demo")
        return checkpoint.config, {name: t.to(META) for name, t in checkpoint.tensors.items()}
    if variant == "awkward":
        return _pixels(UNetConfig(head_dim=30), (90, 210), (45, 63, 10, 90), 1, separable=False)
    if variant == "awkward vae":
        return _latents(UNetConfig(input="vae", prediction="subtract", head_dim=15, decoder_blocks=(1, 1, 1, 1)))
    return _pixels(UNetConfig(residual="bicubic"), ADCSR_WIDTHS, ADCSR_DECODER, 2, separable=True)


def _pixels(config: UNetConfig, widths: Sequence[int], decoder: Sequence[int], layers: int, separable: bool) -> Named:
    """A UNet on the image itself, transformers on all levels but the last, and a KL decoder."""
    attend = [True] * (len(widths) - 1) + [False]
    inputs = 3 * config.unshuffle**2
    unet = unet_shapes(inputs, decoder[-1], widths, layers, separable=separable, transformers=attend)
    return config, _empty("unet", unet) | _empty("decoder", decoder_shapes(decoder, layers + 1, separable=separable))


def _latents(config: UNetConfig) -> Named:
    """A UNet between the halves of a tiny VAE of 30 channels, its latents of 10."""
    with META:
        vae = TinyVAE.regular(width=30, latent_channels=10, config=config, separable_encoder=True)
        tensors = vae.state_dict()
    return config, tensors | _empty("unet", unet_shapes(10, 10, (45, 60), 1, separable=True, transformers=(True, True)))


def _empty(prefix: str, shapes: dict[str, Shape]) -> dict[str, Tensor]:
    start = f"{prefix}." if prefix else ""
    return {f"{start}{name}": torch.empty(shape, device=META) for name, shape in shapes.items()}


def _unet_parts(tensors: Mapping[str, Tensor], config: UNetConfig) -> Parts:
    return {
        "unet": PrunedUNet.from_state(under(tensors, "unet"), config),
        "decoder": KLDecoder.from_state(under(tensors, "decoder"), config),
    }


def _unet(image: Tensor, parts: Mapping[str, Any], config: UNetConfig) -> Tensor:
    return unet_sr(image, parts["unet"], parts["decoder"], config)


# OSEDiff

SD_WIDTHS, SD_HEADS, SD_VAE = (320, 640, 1280, 1280), (5, 10, 20, 20), (128, 256, 512, 512)
PROMPT_TOKENS = 77


def _osediff_shapes(variant: str, reduced: bool) -> Named:
    """As a checkpoint is read: the time step in biases, the prompt in keys and values."""
    widths, heads, vae = (SD_WIDTHS, SD_HEADS, SD_VAE)
    if reduced:
        widths, heads, vae = (32, 64, 64, 64), (1, 2, 4, 4), (32, 32, 32, 32)
    tokens = PROMPT_TOKENS
    unet = sd_unet_shapes(widths, 2, (True, True, True, False), prompt=tokens)
    of_level = dict(zip(widths, heads, strict=True))
    shapes: dict[str, Shape] = {}
    for name, shape in unet.items():
        module, _, last = name.rpartition(".")
        if module.endswith(("attn2.to_k", "attn2.to_v")):
            part = "keys" if module.endswith("k") else "values"
            number = of_level[shape[0]]
            shapes[f"{module[:-5]}.{part}"] = (number, tokens, shape[0] // number)
        elif module.endswith("time_emb_proj"):
            shapes[f"{module.removesuffix('.time_emb_proj')}.time_bias"] = shape[:1]
        elif not module.startswith("time_embedding"):
            shapes[f"{module}.{last}"] = shape
    config = OSEDiffConfig(least=8) if reduced else OSEDiffConfig()
    return config, _empty("unet", shapes) | _empty("", kl_vae_shapes(vae, 4, 2, quant=True))


def _osediff_parts(tensors: Mapping[str, Tensor], config: OSEDiffConfig) -> Parts:
    """With a prompt of unit vectors keys and values are their projections' weights, without a time step its biases."""
    state, heads = {}, {}
    for name, t in under(tensors, "unet").items():
        module, _, last = name.rpartition(".")
        if last in ("keys", "values"):
            state[f"{module}.to_{last[0]}.weight"] = t.transpose(0, 1).flatten(1).T
            heads[module.split(".attentions")[0]] = t.shape[0]
        elif last == "time_bias":
            state |= {f"{module}.time_emb_proj.weight": t.new_zeros(len(t), 4), f"{module}.time_emb_proj.bias": t}
        else:
            state[name] = t
    like = state["conv_in.weight"]
    for number, inputs in ((1, 2), (2, 4)):
        state[f"time_embedding.linear_{number}.weight"] = like.new_zeros(4, inputs)
        state[f"time_embedding.linear_{number}.bias"] = like.new_zeros(4)
    downs = sum(name.startswith("down_blocks.") and name.endswith(".resnets.0.norm1.bias") for name in state)
    levels = [heads.get(f"down_blocks.{i}", heads["mid_block"]) for i in range(downs)]
    vae = {name: t for name, t in tensors.items() if not name.startswith("unet.")}
    of_vae = KLVAE.from_state(vae, replace(kl_config(32), groups=config.vae_groups))
    return {"unet": SDUNet.from_state(state, levels, config.groups[0], config.unet_eps), "vae": of_vae}


def _osediff(image: Tensor, parts: Mapping[str, Any], config: OSEDiffConfig) -> Tensor:
    unet = parts["unet"]
    tokens = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.in_features
    prompt = torch.eye(tokens, dtype=image.dtype, device=image.device)[None]
    return osediff(image, unet, parts["vae"], prompt, config)


# TSD-SR

SD3_TOKENS, SD3_LATENT, SD3_PATCH = 333, 16, 2
CONDITIONING = {"norm1": "modulation", "norm1_context": "context_modulation", "norm_out": "modulation"}
"""Linears of the time step and the pooled prompt, and the tensor that is in the place of each in a checkpoint read."""


def _tsd_sr_shapes(variant: str, reduced: bool) -> Named:
    """As a checkpoint is read: time step and pooled prompt in modulation, the prompt in tokens, one window's table."""
    config = TSDSRConfig(overlap=4) if reduced else TSDSRConfig()
    layers, heads, window, vae = (2, 2, 8, (32, 32, 32, 32)) if reduced else (24, 24, 64, SD_VAE)
    with META:
        network = SD3Transformer(
            SD3Config(
                num_layers=layers,
                num_attention_heads=heads,
                caption_projection_dim=heads * config.head_dim,
                pos_embed_max_size=window // SD3_PATCH,
            )
        )
    tensors = {}
    for name, t in network.state_dict().items():
        module, _, last = name.rpartition(".linear.")
        if last == "weight" and module:
            stem, _, norm = module.rpartition(".")
            made = f"{stem}.{CONDITIONING[norm]}" if stem else f"{norm}.{CONDITIONING[norm]}"
            tensors[made] = t.new_empty(t.shape[0] // t.shape[1], t.shape[1])
        elif not module and not name.startswith(("time_text_embed.", "context_embedder.")):
            tensors[name] = t
    del tensors[f"transformer_blocks.{layers - 1}.attn.add_q_proj.weight"]
    del tensors[f"transformer_blocks.{layers - 1}.attn.add_q_proj.bias"]
    tensors["context"] = torch.empty(SD3_TOKENS, network.config.dim, device=META)
    named = {f"transformer.{name}": t for name, t in tensors.items()}
    return config, named | _empty("", kl_vae_shapes(vae, SD3_LATENT, 2))


def _tsd_sr_parts(tensors: Mapping[str, Tensor], config: TSDSRConfig) -> Parts:
    """With a prompt of unit vectors its tokens are their projection's weights; what is modulated has biases alone."""
    own = under(tensors, "transformer")
    tokens, width = own["context"].shape
    size = SD3Config(
        num_layers=sum(name.endswith(".context_modulation") for name in own),
        attention_head_dim=config.head_dim,
        num_attention_heads=width // config.head_dim,
        joint_attention_dim=tokens,
        caption_projection_dim=width,
        pos_embed_max_size=round(own["pos_embed.pos_embed"].shape[1] ** 0.5),
    )
    with META:
        network = SD3Transformer(size)
    state = {name: torch.zeros_like(t, device=own["context"].device) for name, t in network.state_dict().items()}
    state |= {name: t for name, t in own.items() if name in state} | {"context_embedder.weight": own["context"].T}
    for name in state:
        module, _, last = name.rpartition(".linear.")
        if last == "bias" and module:
            stem, _, norm = module.rpartition(".")
            state[name] = own[f"{stem or norm}.{CONDITIONING[norm]}"].flatten()
    network.load_state_dict(state, assign=True)
    vae = {name: t for name, t in tensors.items() if not name.startswith("transformer.")}
    return {"transformer": network, "vae": KLVAE.from_state(vae, replace(kl_config(32), groups=config.vae_groups))}


def _tsd_sr(image: Tensor, parts: Mapping[str, Any], config: TSDSRConfig) -> Tensor:
    network = parts["transformer"]
    prompt = torch.eye(network.config.joint_attention_dim, dtype=image.dtype, device=image.device)[None]
    pooled = image.new_zeros(1, network.config.pooled_projection_dim)
    window = network.config.pos_embed_max_size * SD3_PATCH
    return tsd_sr(image, network, parts["vae"], prompt, pooled, config, window=window)


SUBJECTS: dict[str, Subject] = {
    "tinysr-dit": Subject(
        ("separable", "dense", "fp8"),
        _tinysr_shapes,
        _tinysr_parts,
        _tinysr,
        quantized={"fp8": "fp8"},
        pages=("separable", "dense", "fp8"),
        bars=(
            Bar("separable", 1.5, "tiny VAE"),
            Bar("separable", 1.0),
            Bar("dense", 1.5, "tiny VAE"),
            Bar("dense", 1.0),
        ),
        lora="transformer",
        teachers=True,
    ),
    "adcsr": Subject(
        ("released",), _adcsr_shapes, _unet_parts, _unet, pages=("released",), bars=(Bar("released", 1.2),)
    ),
    "osediff": Subject(("released",), _osediff_shapes, _osediff_parts, _osediff),
    "tsd-sr": Subject(("released",), _tsd_sr_shapes, _tsd_sr_parts, _tsd_sr),
    "tinysr-unet": Subject(
        ("demo", "large", "awkward", "awkward vae"),
        _unet_shapes,
        _unet_parts,
        _unet,
        pages=("demo",),
        bars=(Bar("demo", 1.0),),
    ),
}
"""By the family's name."""
DEMO = ("tinysr-unet", "demo")
"""Family and variant of the smallest real network."""
PREDICTED = (
    ("tinysr-dit", "separable"),
    ("tinysr-dit", "dense"),
    ("tinysr-dit", "fp8"),
    ("adcsr", "released"),
    ("tinysr-unet", "demo"),
)
"""Families and variants whose launches `python -m benchmarks predict` predicts."""
