"""A small OSEDiff: the folder of its base model as diffusers writes it, and the LoRA of its release.

github.com/cswry/OSEDiff, osediff.py (`save_model`); Stable Diffusion 2.1-base's folder on its hub.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.one_step.osediff import OLD_ATTENTION, merge, modern, osediff
from model.reference.sd_unet import SDUNet, sd_unet_shapes
from tests.layouts.diffusers_module import Files, write_json, write_module
from tests.layouts.weights import fill, level, rounded, write_pickle
from tinysr_kernels.families import ColorFix, OSEDiffConfig

UNET, VAE, SCHEDULER = "sd/unet", "sd/vae", "sd/scheduler"
LORA, EMBEDDING = "preset/models/osediff.pkl", "prompt_embeds.pt"
TOKENS, FEATURES = 7, 12
SCHEDULE = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "trained_betas": None,
}


@dataclass
class OSEDiffLayout:
    """What was written, and the networks that a loader must arrive at."""

    folder: Path
    unet: SDUNet
    vae: KLVAE
    prompt: Tensor
    config: OSEDiffConfig
    heads: tuple[int, ...] = field(default=())

    def upscale(
        self, image: Tensor, color_fix: ColorFix = "adain", factor: int = 4, prompt: Tensor | None = None
    ) -> Tensor:
        """The reference result, [N,3,s*H,s*W], computed in the image's dtype (float32 or float64)."""
        unet, vae = self.unet.to(image.dtype), self.vae.to(image.dtype)
        text = (self.prompt if prompt is None else prompt).to(image.dtype)
        return osediff(image, unet, vae, text, self.config, color_fix, factor)


def write_osediff(
    folder: str | Path,
    *,
    channels: Sequence[int] = (8, 16, 16),
    heads: Sequence[int] = (2, 4, 1),
    layers: int = 1,
    vae_channels: Sequence[int] = (4, 8, 8, 8),
    groups: int = 4,
    ranks: tuple[int, int] = (3, 2),
    files: Files = "safetensors",
    old_attention_names: bool = True,
    embedding: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> OSEDiffLayout:
    """Write all files with small random weights stored in `dtype`, and return the networks they describe.

    heads: per level, of widths that differ. ranks: of the LoRA of UNet and VAE. files: how the base model's weights are
    stored; "snapshot": each module in four copies, of which all but the first hold other weights. embedding: whether
    the prompt's lies beside.
    """
    folder = Path(folder)
    base = write_base(
        folder, channels, heads, layers, vae_channels, groups, files, old_attention_names, embedding, dtype, seed
    )
    unet, vae, generator = base.unet, base.vae, base.generator
    lora = {
        "unet": random_lora(unet.state_dict(), _of_unet, ranks[0], dtype, generator),
        "vae": random_lora(vae.state_dict(), _of_vae, ranks[1], dtype, generator),
    }
    trained = {"weight": unet.conv_in.weight + 0.1, "bias": unet.conv_in.bias - 0.2}
    lora["unet"] |= {f"conv_in.base_layer.{part}": tensor.to(dtype) for part, tensor in trained.items()}
    write_pickle(folder / LORA, _release(lora, ranks))
    unet.load_state_dict(merge(unet.state_dict(), lora["unet"]))
    vae.load_state_dict(merge(modern(vae.state_dict()), lora["vae"]))
    config = OSEDiffConfig(groups=(groups,), vae_groups=(groups,))
    return OSEDiffLayout(folder, unet, vae, base.prompt.float(), config, tuple(heads))


@dataclass
class Base:
    """Stable Diffusion as it was written, before any LoRA."""

    unet: SDUNet
    vae: KLVAE
    prompt: Tensor
    generator: torch.Generator


def write_base(
    folder: Path,
    channels: Sequence[int] = (8, 16, 16),
    heads: Sequence[int] = (2, 4, 1),
    layers: int = 1,
    vae_channels: Sequence[int] = (4, 8, 8, 8),
    groups: int = 4,
    files: Files = "safetensors",
    old_attention_names: bool = True,
    embedding: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    amplified: float = 60,
) -> Base:
    """The base model's folder and a prompt's embedding. amplified: how strong latents are that the decoder gets."""
    attends = [i < len(channels) - 1 for i in range(len(channels))]
    shapes = sd_unet_shapes(channels, layers, attends, prompt=FEATURES)
    unet, vae = SDUNet(shapes, heads, groups), KLVAE(kl_vae_shapes(vae_channels, 4, layers, True), kl_config(groups))
    fill(unet, seed)
    fill(vae, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    # As strong as what the network decodes: x0 is about 1 / (sqrt(a) k) times the noise.
    level(vae.decoder.conv_out, vae.decode, amplified * torch.randn(1, 4, 8, 8, generator=generator), 0.0, 0.3)
    for module in (unet, vae):
        rounded(module, dtype)
    write_module(folder / UNET, _unet_config(channels, heads, layers, groups), unet.state_dict(), files, dtype)
    public = _old(vae.state_dict()) if old_attention_names else vae.state_dict()
    write_module(folder / VAE, _vae_config(vae_channels, layers, groups), public, files, dtype)
    write_json(folder / SCHEDULER / "scheduler_config.json", SCHEDULE)
    write_json(folder / "sd/model_index.json", {"_class_name": "StableDiffusionPipeline"})
    prompt = torch.randn(1, TOKENS, FEATURES, generator=generator).to(dtype)
    if embedding:
        write_pickle(folder / EMBEDDING, prompt)
    return Base(unet, vae, prompt, generator)


def _of_unet(name: str) -> bool:
    """Whether the release adapts a module: every convolution and projection but those of the time step."""
    return not name.startswith("time_embedding.") and "time_emb_proj" not in name


def _of_vae(name: str) -> bool:
    return name.startswith(("encoder.", "quant_conv"))


def of_side(module: str) -> str:
    """The adapter that OSEDiff puts on a module."""
    side = "encoder" if module.startswith(("down", "conv_in", "encoder", "quant")) else "decoder"
    return f".default_{'others' if module.startswith('mid_block') else side}"


def random_lora(
    state: dict[str, Tensor],
    adapts: Callable[[str], bool],
    rank: int,
    dtype: torch.dtype,
    generator: torch.Generator,
    adapter: Callable[[str], str] = of_side,
) -> dict[str, Tensor]:
    """Updates of every matrix and kernel that `adapts` names, each about half as large as its weight.

    adapter: what stands in a module's keys after lora_A and lora_B.
    """
    lora = {}
    for name, weight in state.items():
        if weight.ndim < 2 or not adapts(name):
            continue
        module = name.removesuffix(".weight")
        a = torch.randn(rank, *weight.shape[1:], generator=generator) / rank**0.5
        b = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator)
        lora[f"{module}.lora_A{adapter(module)}.weight"] = a.to(dtype)
        lora[f"{module}.lora_B{adapter(module)}.weight"] = (b * 0.1 * rank / weight[0].numel() ** 0.5).to(dtype)
    return lora


def _release(lora: dict[str, dict[str, Tensor]], ranks: tuple[int, int]) -> dict[str, Any]:
    """osediff.pkl: lists of module names, ranks, state dicts."""
    modules = sorted({name.partition(".lora_")[0] for name in lora["unet"]})
    return {
        "vae_lora_encoder_modules": sorted({name.partition(".lora_")[0] for name in lora["vae"]}),
        "unet_lora_encoder_modules": [name for name in modules if name.startswith(("down", "conv_in"))] * 2,
        "unet_lora_decoder_modules": [name for name in modules if name.startswith(("up", "conv_out"))],
        "unet_lora_others_modules": [name for name in modules if name.startswith("mid")],
        "rank_unet": ranks[0],
        "rank_vae": ranks[1],
        "state_dict_unet": lora["unet"],
        "state_dict_vae": lora["vae"],
    }


def _old(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the VAE's attention before diffusers 0.15; the encoder's as convolutions."""
    renamed = {}
    for name, tensor in state.items():
        if ".attentions." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(f".{new}.", f".{old}.")
            if name.startswith("encoder.") and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        renamed[name] = tensor
    return renamed


def _unet_config(channels: Sequence[int], heads: Sequence[int], layers: int, groups: int) -> dict[str, Any]:
    down = ["CrossAttnDownBlock2D"] * (len(channels) - 1) + ["DownBlock2D"]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.8.0",
        "act_fn": "silu",
        "attention_head_dim": list(heads),
        "block_out_channels": list(channels),
        "cross_attention_dim": FEATURES,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "norm_eps": 1e-05,
        "use_linear_projection": True,
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 64,
    }


def _vae_config(channels: Sequence[int], layers: int, groups: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.8.0",
        "act_fn": "silu",
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "sample_size": 768,
    }
