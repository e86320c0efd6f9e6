"""The teachers, TSD-SR and OSEDiff, as baselines: diffusers' modules at their public sizes with random weights.

They are timed for the comparison in which the paper reports TinySR 5.68 times faster than its teacher. LoRA is taken as
merged and the prompt embedding as precomputed; neither changes the shapes. Built from configurations alone, nothing is
downloaded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("TSD-SR", "OSEDiff")
SD3: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
SD21: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
KL: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 512,
}
SMALL: dict[str, dict[str, Any]] = {
    "SD3": {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 128},
    "SD21": {"block_out_channels": (32, 32, 64, 64), "attention_head_dim": (1, 1, 2, 2)},
    "KL": {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
}
"""Overrides for reduced sizes."""
TOKENS = {"TSD-SR": (333, 4096), "OSEDiff": (77, 1024)}
"""Shape of the prompt embedding: CLIP's 77 tokens and T5's 256, as in diffusers' SD3 pipeline; CLIP's 77."""
ALPHA = 0.0047
"""Cumulative alpha of OSEDiff's x0 prediction at t = 999; its value does not affect the timing."""


class Teacher(torch.nn.Module):
    """Encoder, backbone, decoder: image [N,3,H,W] in [0,1] -> [N,3,4H,4W] in [0,1], adain included."""

    def __init__(self, name: str, reduced: bool = False) -> None:
        from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel

        super().__init__()
        small = SMALL if reduced else {key: {} for key in SMALL}
        self.name = name
        self.backbone: Any
        self.vae: Any
        self.pooled: Tensor
        self.prompt: Tensor
        self.time: Tensor
        if name == "TSD-SR":
            self.backbone = SD3Transformer2DModel(**SD3 | small["SD3"])
            self.vae = AutoencoderKL(
                **KL | small["KL"], latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
            )
            self.register_buffer("pooled", torch.randn(1, 2048))
        else:
            self.backbone = UNet2DConditionModel(**SD21 | small["SD21"])
            self.vae = AutoencoderKL(**KL | small["KL"], latent_channels=4)
        self.register_buffer("prompt", torch.randn(1, *TOKENS[name]))
        self.register_buffer("time", torch.tensor([1000.0 if name == "TSD-SR" else 999.0]))

    def forward(self, image: Tensor) -> Tensor:
        n = image.shape[0]
        large = F.interpolate(image, scale_factor=4.0, mode="bicubic", align_corners=False) * 2 - 1
        z = self.vae.encode(large).latent_dist.mode()
        prompt, time = self.prompt.expand(n, -1, -1), self.time.expand(n)
        if self.name == "TSD-SR":
            pooled = self.pooled.expand(n, -1)
            z = z - self.backbone(z, prompt, pooled, time, return_dict=False)[0]
        else:
            noise = self.backbone(z, time, prompt, return_dict=False)[0]
            z = (z - (1 - ALPHA) ** 0.5 * noise) / ALPHA**0.5
        sr = self.vae.decode(z, return_dict=False)[0].clamp(-1, 1) / 2 + 0.5
        mean, deviation = sr.mean((2, 3), keepdim=True), sr.std((2, 3), keepdim=True)
        target_mean, target_deviation = image.mean((2, 3), keepdim=True), image.std((2, 3), keepdim=True)
        return ((sr - mean) / (deviation + 1e-5) * target_deviation + target_mean).clamp(0, 1)


def teacher(name: str, device: torch.device, dtype: torch.dtype, reduced: bool = False) -> Teacher:
    """One of NAMES with random weights, made on the device."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            made = Teacher(name, reduced)
    finally:
        torch.set_default_dtype(previous)
    return made.requires_grad_(False).eval()
