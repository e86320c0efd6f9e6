"""A small TSD-SR: the folder of its base model as diffusers writes it, both LoRA and the embeddings of its release.

github.com/Microtreei/TSD-SR; Stable Diffusion 3's folder on its hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.one_step.tsd_sr import merge, tsd_sr
from model.reference.sd3_transformer import SD3Config, SD3Transformer
from tests.layouts.diffusers_module import Files, write_json, write_module
from tests.layouts.weights import fill, level, random_image, rounded, write_pickle, write_safetensors
from tinysr_kernels.families import ColorFix, TSDSRConfig

TRANSFORMER, VAE = "sd3/transformer", "sd3/vae"
LORA, VAE_LORA = "checkpoint/tsdsr/transformer.safetensors", "checkpoint/tsdsr/vae.safetensors"
PROMPT, POOLED = "dataset/default/prompt_embeds.pt", "dataset/default/pool_embeds.pt"
TOKENS, LATENT, SCALE, SHIFT = 7, 4, 1.5305, 0.0609
ADAPTED = re.compile(
    r"(^|\.)(to_[qkv]|to_out\.0|add_[qkv]_proj|proj|linear|proj_out)\.weight$|^encoder\..*(conv|to_|shortcut).*weight$"
)
"""What the release adapts: 266 modules of SD3's transformer, 31 of its VAE's encoder."""


@dataclass
class TSDSRLayout:
    """What was written, and the networks that a loader must arrive at."""

    folder: Path
    transformer: SD3Transformer
    vae: KLVAE
    prompt: Tensor
    pooled: Tensor
    config: TSDSRConfig
    window: int

    def upscale(self, image: Tensor, color_fix: ColorFix = "wavelet", factor: int = 4) -> Tensor:
        """The reference result, [N,3,s*H,s*W], computed in the image's dtype (float32 or float64)."""
        transformer, vae = self.transformer.to(image.dtype), self.vae.to(image.dtype)
        texts = (self.prompt.to(image.dtype), self.pooled.to(image.dtype))
        return tsd_sr(image, transformer, vae, *texts, self.config, color_fix, factor, self.window)


def write_tsd_sr(
    folder: str | Path,
    *,
    layers: int = 3,
    heads: int = 2,
    head_dim: int = 8,
    vae_channels: Sequence[int] = (4, 8, 8, 8),
    groups: int = 4,
    ranks: tuple[int, int] = (3, 2),
    files: Files = "safetensors",
    dtype: torch.dtype = torch.float32,
    window: int = 8,
    seed: int = 0,
) -> TSDSRLayout:
    """Write all files with small random weights stored in `dtype`, and return the networks they describe.

    ranks: of the LoRA of transformer and VAE. files: how the base model's weights are stored. window: of the reference
    pipeline; the loader's is a constant. Every embedding lies twice: the one in dataset/null is another.
    """
    folder = Path(folder)
    dim = heads * head_dim
    size = SD3Config(
        sample_size=16, in_channels=LATENT, out_channels=LATENT, num_layers=layers, attention_head_dim=head_dim,
        num_attention_heads=heads, joint_attention_dim=12, caption_projection_dim=dim, pooled_projection_dim=10,
        pos_embed_max_size=7,
    )  # fmt: skip
    transformer = SD3Transformer(size)
    vae = KLVAE(kl_vae_shapes(vae_channels, LATENT, 1), kl_config(groups))
    fill(transformer, seed)
    fill(vae, seed + 1)
    generator = torch.Generator().manual_seed(seed + 2)
    # Latents of order one, so that the scale and the transformer's nonlinearities show.
    level(vae.encoder.conv_out, vae.encoder, random_image(64, 64) * 2 - 1, 0.1, 0.7)
    level(vae.decoder.conv_out, vae.decode, torch.randn(1, LATENT, 8, 8, generator=generator), 0.0, 0.3)
    for module in (transformer, vae):
        rounded(module, dtype)
    lora = _lora(transformer.state_dict(), lambda name: True, ranks[0], dtype, generator)
    of_vae = _lora(vae.state_dict(), lambda name: name.startswith("encoder."), ranks[1], dtype, generator)
    config = transformer.config_json() | {"qk_norm": None, "dual_attention_layers": []}
    write_module(folder / TRANSFORMER, config, transformer.state_dict(), files, dtype)
    write_module(folder / VAE, _vae_config(vae_channels, groups), vae.state_dict(), files, dtype)
    write_json(folder / "sd3/model_index.json", {"_class_name": "StableDiffusion3Pipeline"})
    write_safetensors(folder / LORA, lora)
    write_safetensors(folder / VAE_LORA, of_vae)
    prompt = torch.randn(1, TOKENS, size.joint_attention_dim, generator=generator).to(dtype)
    pooled = torch.randn(1, size.pooled_projection_dim, generator=generator).to(dtype)
    for name, tensor in ((PROMPT, prompt), (POOLED, pooled)):
        write_pickle(folder / name, tensor)
        write_pickle(folder / name.replace("default", "null"), tensor * 0)
    transformer.load_state_dict(merge(transformer.state_dict(), lora))
    vae.load_state_dict(merge(vae.state_dict(), of_vae))
    made = TSDSRConfig(head_dim, 2, SCALE, (groups,))
    return TSDSRLayout(folder, transformer, vae, prompt.float(), pooled.float(), made, window)


def _lora(
    state: dict[str, Tensor], adapts: Callable[[str], bool], rank: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Updates of every matrix and kernel that the release adapts, each about a third as large as its weight."""
    lora = {}
    for name, weight in state.items():
        if weight.ndim < 2 or not ADAPTED.search(name) or not adapts(name):
            continue
        module = name.removesuffix(".weight")
        a = torch.randn(rank, *weight.shape[1:], generator=generator) / rank**0.5
        b = torch.randn(weight.shape[0], rank, *(1 for _ in weight.shape[2:]), generator=generator)
        lora[f"transformer.{module}.lora_A.weight"] = a.to(dtype)
        lora[f"transformer.{module}.lora_B.weight"] = (b * 0.3 / weight[0].numel() ** 0.5).to(dtype)
    return lora


def _vae_config(channels: Sequence[int], groups: int) -> dict[str, Any]:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENT,
        "layers_per_block": 1,
        "norm_num_groups": groups,
        "scaling_factor": SCALE,
        "shift_factor": SHIFT,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "latents_mean": None,
        "latents_std": None,
    }
