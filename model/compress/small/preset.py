"""Sizes and lengths of the small run. `SMALL` is what docs/compression/ reports; `TRIAL` runs in seconds, for tests."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from model.compress.mask_stage import MaskSettings
from model.compress.restoration import ImageLossWeights
from model.compress.training.settings import StageSettings
from model.compress.vae.train import DecoderWeights
from model.reference.sd3_transformer import SD3Config


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
    images: int = 400
    """Procedural images, from each of which `crops` pairs of 128 and 32 pixels are cut."""
    crops: int = 8
    # The teacher.
    vae_channels: tuple[int, ...] = (32, 64, 64)
    vae_layers: int = 1
    vae_groups: int = 8
    vae_eps: float = 10.0
    """Of the VAE's GroupNorms. Every norm removes brightness and contrast, and with SD's 1e-6 a short training does not
    learn to restore them; a large epsilon keeps them."""
    prompt_tokens: int = 16
    transformer: SD3Config = field(default_factory=_transformer)
    window: int = 16
    kl_weight: float = 1e-3
    teacher_vae: StageSettings = StageSettings(1300, 1.5e-3, 8, ema_decay=0.995, precision="bfloat16")
    teacher: StageSettings = StageSettings(1200, 1e-3, 8, ema_decay=0.998, precision="bfloat16")
    # The student's VAE.
    width: int = 32
    calibration: int = 24
    """Images that importance and frozen statistics are measured on."""
    encoder_blocks: tuple[int, ...] = (1, 2, 3)
    decoder_blocks: tuple[int, ...] = (3, 2, 2)
    discriminator_width: int = 16
    student_encoder: StageSettings = StageSettings(500, 2e-3, 8, ema_decay=0.99, precision="bfloat16")
    student_decoder: StageSettings = StageSettings(1300, 2e-3, 8, ema_decay=0.99, precision="bfloat16")
    decoder_weights: DecoderWeights = DecoderWeights(discriminator_start_step=1000)
    # Masks: half of the blocks stay.
    rank: int = 64
    masks: MaskSettings = MaskSettings(
        StageSettings(200, 5e-4, 8, warmup_steps=1, constant_learning_rate=True, precision="bfloat16", log_every=10),
        keep=6,
        reach=2,
    )
    methods: tuple[str, ...] = ("learned", "similarity", "random")
    # Restoration.
    restore_latents: StageSettings = StageSettings(500, 2e-3, 8, ema_decay=0.99, precision="bfloat16")
    restore_images: StageSettings = StageSettings(250, 5e-4, 8, ema_decay=0.98, precision="bfloat16")
    image_weights: ImageLossWeights = ImageLossWeights(latent_l1=0.0, image_l1=5.0, discriminator_start_step=150)

    @property
    def latent(self) -> int:
        return self.transformer.in_channels


SMALL = Preset()


def trial() -> Preset:
    """Every stage of `SMALL`, for a few steps, for tests."""
    few: dict[str, Any] = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "save_every": 2, "log_every": 1}
    changed = {
        f.name: replace(getattr(SMALL, f.name), **few)
        for f in fields(SMALL)
        if isinstance(getattr(SMALL, f.name), StageSettings)
    }
    return replace(
        SMALL,
        images=2,
        crops=3,
        calibration=4,
        masks=replace(SMALL.masks, stage=replace(SMALL.masks.stage, **few)),
        decoder_weights=replace(SMALL.decoder_weights, discriminator_start_step=1),
        image_weights=replace(SMALL.image_weights, discriminator_start_step=1),
        **changed,
    )
