"""Small random teachers in diffusers' layout, as its own save_pretrained writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

SD3 = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "out_channels": 4,
    "pos_embed_max_size": 12,
}
WINDOW = 16
LORA_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "proj", "linear", "linear_1", "linear_2", "net.2", "proj_out")


def randomize(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            scale = 0.1 if value.ndim == 1 else value[0].numel() ** -0.5
            value.copy_(torch.randn(value.shape, generator=generator) * scale)


def write_teacher(folder: Path, *, shards: bool = False, **changed: Any) -> Any:
    """transformer/ (in shards or not) and vae/ in `folder`; returns diffusers' transformer."""
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(**SD3 | changed).eval()
    randomize(transformer, 0)
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB" if shards else "5GB")
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        latent_channels=SD3["in_channels"],
        norm_num_groups=4,
        scaling_factor=1.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    randomize(vae, 1)
    vae.save_pretrained(folder / "vae")
    return transformer


def lora_pairs(module: nn.Module, prefix: str, rank: int = 3, seed: int = 5) -> dict[str, Tensor]:
    """Pairs for all modules that TSD-SR's LoRA adapts, the prompt's stream included."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, parameter in module.named_parameters():
        own = name.removesuffix(".weight")
        if not name.endswith(".weight") or not any(f".{own}".endswith(f".{target}") for target in LORA_TARGETS):
            continue
        outputs, *rest = parameter.shape
        down = torch.randn(rank, *rest, generator=generator) / parameter[0].numel() ** 0.5
        up = torch.randn(outputs, rank, *[1] * len(rest[1:]), generator=generator) * 0.2
        pairs |= {f"{prefix}{own}.lora_A.weight": down, f"{prefix}{own}.lora_B.weight": up}
    return pairs


def write_lora(folder: Path, pairs: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pairs, folder / "transformer.safetensors")
