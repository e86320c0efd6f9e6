"""A small TinySR in the folder structure and file formats of its release (github.com/Microtreei/TinySR)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.reference.lora import merge_lora
from model.reference.pipelines import tinysr
from model.reference.tiny_vae import TinyVAE
from model.reference.tinysr_dit import TinySRTransformer
from tests.layouts.weights import fill, fill_tiny, rounded, write_pickle, write_safetensors
from tinysr_kernels.families import ColorFix, TinySRConfig

TRANSFORMER = "tinybackbone/prune-12-merge-tinysr/transformer"
VAE = "vae/separable"
LORA = "tinysr/transformer.safetensors"
STEM = "diffusion_pytorch_model"
CONTEXT_DIM = 40
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "proj", "linear", "linear_1", "linear_2", "net.2")

Conditioning = Literal["pooled", "temb", "buffers"]


@dataclass
class TinySRLayout:
    """What was written, and the networks that a loader must arrive at (LoRA merged, modulation cached)."""

    folder: Path
    transformer: TinySRTransformer
    vae: TinyVAE
    config: TinySRConfig

    def tensors(self) -> dict[str, Tensor]:
        """The normalized checkpoint: `transformer.*`, `encoder.*`, `decoder.*`."""
        return self.transformer.normalized_state() | self.vae.state_dict()

    def upscale(self, image: Tensor, color_fix: ColorFix = "adain") -> Tensor:
        """The reference result, [N,3,4H,4W], computed in the image's dtype (float32 or float64)."""
        transformer, vae = self.transformer.to(image.dtype), self.vae.to(image.dtype)
        result = tinysr(image, transformer, vae, self.config, color_fix)
        transformer.float()
        vae.float()
        return result


def write_tinysr(
    folder: str | Path,
    *,
    conditioning: Conditioning = "pooled",
    lora: bool | int = False,
    sharded: bool = False,
    as_bin: bool = False,
    leftovers: bool = False,
    decoys: bool = False,
    embedders: bool = True,
    separable_encoder: bool = True,
    separable_decoder: bool = False,
    dim: int = 128,
    layers: int = 2,
    table: int = 8,
    pooled_dim: int = 96,
    channels: int = 16,
    vae_width: int = 16,
    config: TinySRConfig | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> TinySRLayout:
    """Write the release's folder with small random weights stored in `dtype`; return its networks.

    conditioning: the source that counts: the pooled embedding through the embedders, temb.pt, or modulation
    buffers filled by a first forward. decoys: sources of lower precedence lie there too, with other values.
    embedders=False (with temb) leaves out the weights of time_text_embed. lora: its rank, True for 4.
    sharded, as_bin: how the transformer's weights (as_bin: the VAE's too) are stored. leftovers: weights of
    SD3's context stream are there.
    """
    folder = Path(folder)
    config = config or TinySRConfig()
    transformer = TinySRTransformer(
        dim=dim,
        layers=layers,
        head_dim=config.head_dim,
        channels=channels,
        patch_size=config.patch_size,
        pooled_dim=pooled_dim,
        table=table,
        sample_size=32,
        pos_embed_max_size=table + 4,
    )
    fill(transformer, seed)
    rounded(transformer, dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    pooled = torch.randn(1, pooled_dim, generator=generator).to(dtype)
    temb = torch.randn(1, dim, generator=generator).to(dtype)
    pairs = _lora(transformer, 4 if lora is True else int(lora), generator) if lora else {}
    state = _public_state(transformer, config, conditioning, pooled, embedders)
    reference = _reference(state, pairs, config, conditioning, pooled, temb)
    if leftovers:
        state |= _leftovers(dim, layers, generator)
        if pairs:
            pairs |= _leftover_lora(dim, generator)
    _write_transformer(folder, {k: v.to(dtype) for k, v in state.items()}, sharded, as_bin)
    _write_json(folder / TRANSFORMER / "config.json", _transformer_config(transformer, config, layers, pooled_dim))
    if pairs:
        write_safetensors(folder / LORA, pairs)
    _write_embeddings(folder, conditioning, pooled, temb, transformer.pos_embed.pos_embed.to(dtype), decoys)
    vae = TinyVAE.regular(
        width=vae_width,
        latent_channels=channels,
        config=config,
        separable_encoder=separable_encoder,
        separable_decoder=separable_decoder,
    )
    fill_tiny(vae.encoder, seed + 2)
    fill_tiny(vae.decoder, seed + 3)
    rounded(vae, dtype)
    _write_vae(folder, {k: v.to(dtype) for k, v in vae.state_dict().items()}, as_bin)
    _write_json(folder / VAE / "config.json", _vae_config(config, vae_width, channels))
    return TinySRLayout(folder, reference, vae, config)


# ------------------------------------------------------------------------------------------- the networks
def _public_state(
    transformer: TinySRTransformer,
    config: TinySRConfig,
    conditioning: Conditioning,
    pooled: Tensor,
    embedders: bool,
) -> dict[str, Tensor]:
    """The state dict as saved before a first forward, or (conditioning by buffers) after one."""
    state = {k: v.clone() for k, v in transformer.state_dict().items()}
    if conditioning == "buffers":
        cached = TinySRTransformer.from_state(state, config)
        return dict(cached.cache_modulation(pooled=pooled.float()).state_dict())
    if conditioning == "temb" and not embedders:
        return {k: v for k, v in state.items() if not k.startswith("time_text_embed.")}
    return state


def _reference(
    state: dict[str, Tensor],
    pairs: dict[str, Tensor],
    config: TinySRConfig,
    conditioning: Conditioning,
    pooled: Tensor,
    temb: Tensor,
) -> TinySRTransformer:
    """The network after everything a loader does: LoRA merged in float32, modulation evaluated in float64."""
    model = TinySRTransformer.from_state(merge_lora(state, pairs), config, torch.float64)
    if conditioning == "pooled":
        model.cache_modulation(pooled=pooled.double())
    elif conditioning == "temb":
        model.cache_modulation(temb=temb.double())
    return model.float()


def _lora(transformer: TinySRTransformer, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Pairs for every module that the release's LoRA adapts, each changing its weight by about a third."""
    pairs: dict[str, Tensor] = {}
    for name, parameter in transformer.named_parameters():
        module = name.removesuffix(".weight")
        if name.endswith(".bias") or not any(f".{module}".endswith(f".{target}") for target in LORA_TARGETS):
            continue
        outputs, *rest = parameter.shape
        fan_in = parameter[0].numel()
        down = torch.randn(rank, *rest, generator=generator) / fan_in**0.5
        up = torch.randn(outputs, rank, *(1 for _ in rest[1:]), generator=generator) * 0.3 / rank**0.5
        pairs |= {f"transformer.{module}.lora_A.weight": down, f"transformer.{module}.lora_B.weight": up}
    return pairs


def _leftovers(dim: int, layers: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of SD3's context stream, which the image stream does not use."""
    shapes = {"context_embedder": (dim, CONTEXT_DIM)}
    for i in range(layers):
        block = f"transformer_blocks.{i}"
        shapes |= {f"{block}.attn.{name}": (dim, dim) for name in ("add_q_proj", "add_k_proj", "add_v_proj")}
        shapes[f"{block}.norm1_context.linear"] = ((2 if i == layers - 1 else 6) * dim, dim)
        if i < layers - 1:
            shapes |= {
                f"{block}.attn.to_add_out": (dim, dim),
                f"{block}.ff_context.net.0.proj": (4 * dim, dim),
                f"{block}.ff_context.net.2": (dim, 4 * dim),
            }
    state = {f"{name}.weight": torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return state | {f"{name}.bias": torch.randn(shape[0], generator=generator) for name, shape in shapes.items()}


def _leftover_lora(dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    block = "transformer.transformer_blocks.0"
    pairs: dict[str, Tensor] = {}
    for module, outputs, inputs in (("norm1_context.linear", 6 * dim, dim), ("ff_context.net.2", dim, 4 * dim)):
        pairs[f"{block}.{module}.lora_A.weight"] = torch.randn(4, inputs, generator=generator)
        pairs[f"{block}.{module}.lora_B.weight"] = torch.randn(outputs, 4, generator=generator)
    return pairs


# ---------------------------------------------------------------------------------------------- the files
def _write_transformer(folder: Path, state: dict[str, Tensor], sharded: bool, as_bin: bool) -> None:
    suffix, write = (".bin", write_pickle) if as_bin else (".safetensors", write_safetensors)
    if not sharded:
        write(folder / TRANSFORMER / f"{STEM}{suffix}", state)
        return
    names = sorted(state)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    where: dict[str, str] = {}
    for i, half in enumerate(halves, start=1):
        file = f"{STEM}-{i:05d}-of-{len(halves):05d}{suffix}"
        write(folder / TRANSFORMER / file, {name: state[name] for name in half})
        where |= dict.fromkeys(half, file)
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / TRANSFORMER / f"{STEM}{suffix}.index.json", index)


def _write_vae(folder: Path, state: dict[str, Tensor], as_bin: bool) -> None:
    suffix, write = (".bin", write_pickle) if as_bin else (".safetensors", write_safetensors)
    write(folder / VAE / f"{STEM}{suffix}", state)


def _write_embeddings(
    folder: Path, conditioning: Conditioning, pooled: Tensor, temb: Tensor, table: Tensor, decoys: bool
) -> None:
    default, cache = folder / "dataset/default", folder / "dataset/cache"
    write_pickle(default / "prompt_embeds.pt", torch.ones(1, 7, CONTEXT_DIM))
    write_pickle(cache / "pos_embed.pt", table.clone())
    if conditioning == "pooled":
        write_pickle(default / "pool_embeds.pt", pooled)
    elif conditioning == "buffers" and decoys:
        write_pickle(default / "pool_embeds.pt", -pooled)
    if conditioning == "temb":
        write_pickle(cache / "temb.pt", temb)
    elif decoys:
        write_pickle(cache / "temb.pt", -temb)


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _transformer_config(
    transformer: TinySRTransformer, config: TinySRConfig, layers: int, pooled_dim: int
) -> dict[str, object]:
    dim, channels = transformer.pos_embed.proj.weight.shape[:2]
    return {
        "_class_name": "TinySD3Transformer2DModel",
        "_diffusers_version": "0.31.0",
        "attention_head_dim": config.head_dim,
        "caption_projection_dim": dim,
        "in_channels": channels,
        "joint_attention_dim": CONTEXT_DIM,
        "num_attention_heads": dim // config.head_dim,
        "num_layers": layers,
        "out_channels": channels,
        "patch_size": config.patch_size,
        "pooled_projection_dim": pooled_dim,
        "pos_embed_max_size": transformer.window // config.patch_size + 4,
        "sample_size": 32,
    }


def _vae_config(config: TinySRConfig, width: int, channels: int) -> dict[str, object]:
    return {
        "_class_name": "AutoencoderTiny",
        "_diffusers_version": "0.31.0",
        "act_fn": "relu",
        "block_out_channels": [width] * len(config.encoder_blocks),
        "decoder_block_out_channels": [width] * len(config.decoder_blocks),
        "encoder_block_out_channels": [width] * len(config.encoder_blocks),
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": channels,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "num_decoder_blocks": list(config.decoder_blocks),
        "num_encoder_blocks": list(config.encoder_blocks),
        "out_channels": 3,
        "scaling_factor": config.scaling_factor,
        "shift_factor": 0.0,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }
