"""Sizes and lengths of the small run. `SMALL` is what docs/compression/ reports; `TINY` is for tests."""

from __future__ import annotations

from dataclasses import dataclass, field

from model.compress.stage import StageSettings
from model.sd3_transformer import SD3Config


def _transformer() -> SD3Config:
    return SD3Config(
        sample_size=16,
        in_channels=8,
        num_layers=12,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=96,
        out_channels=8,
        pos_embed_max_size=12,
    )


@dataclass(frozen=True)
class Preset:
    """Everything the small run depends on; pixels per latent and side are 4, windows 16 latents (64 pixels)."""

    seed: int = 0
    pictures: int = 400
    """Procedural pictures, from each of which `crops` pairs of 128 and 32 pixels are cut."""
    crops: int = 8
    # The teacher.
    vae_channels: tuple[int, ...] = (32, 64, 64)
    vae_layers: int = 1
    vae_groups: int = 8
    prompt_tokens: int = 16
    transformer: SD3Config = field(default_factory=_transformer)
    window: int = 16
    kl_weight: float = 1e-3
    teacher_vae: StageSettings = StageSettings(1600, 1e-3, 8, ema=0.995, precision="bfloat16")
    teacher: StageSettings = StageSettings(2500, 5e-4, 16, ema=0.998, precision="bfloat16")

    @property
    def latent(self) -> int:
        return self.transformer.in_channels


SMALL = Preset()
