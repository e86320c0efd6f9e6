"""Inside diffusers' own pipelines on small random weights: the images are those of the plain pipeline to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tinysr_kernels
from tests.runtime.autoencoder.modules import autoencoder, diffusers, is_fused, randomise

ROUNDING = 1e-4
"""Largest difference of images in [0,1]: float32 rounding of a few network calls in a row."""


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ready(module: nn.Module) -> Any:
    randomise(module, 3)
    return module.eval().requires_grad_(False)


def unet() -> Any:
    return ready(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    )


def stable_diffusion(vae: Any, kind: str = "StableDiffusionPipeline") -> Any:
    return getattr(diffusers, kind)(
        vae=vae,
        unet=unet(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def text(seed: int = 4) -> dict[str, Any]:
    """The embeddings of a prompt and of its opposite; no text encoder is needed."""
    return {"prompt_embeds": drawn(1, 5, 12, seed=seed), "negative_prompt_embeds": drawn(1, 5, 12, seed=seed + 1)}


def picture(pipe: Any, **options: Any) -> np.ndarray:
    """One image [1,H,W,3] in [0,1]."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(8)
    result = pipe(generator=generator, num_inference_steps=2, output_type="np", **options)
    found: np.ndarray = result.images
    return found


def text_to_image(vae: Any) -> np.ndarray:
    return picture(stable_diffusion(vae), height=16, width=24, guidance_scale=3.0, **text())


def image_to_image(vae: Any) -> np.ndarray:
    """Encodes the image too, and draws from the posterior with the pipeline's generator."""
    image = drawn(1, 3, 16, 24, seed=6).sigmoid()
    pipe = stable_diffusion(vae, "StableDiffusionImg2ImgPipeline")
    return picture(pipe, image=image, strength=0.9, guidance_scale=2.0, **text())


def stable_diffusion_3(vae: Any) -> np.ndarray:
    """16 latent channels, shift and scale."""
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=ready(transformer),
        vae=vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), None),
        **dict.fromkeys(("tokenizer", "tokenizer_2", "tokenizer_3"), None),
    )
    pooled = {"pooled_prompt_embeds": drawn(1, 10, seed=7), "negative_pooled_prompt_embeds": drawn(1, 10, seed=8)}
    return picture(pipe, height=16, width=16, guidance_scale=2.0, **text(), **pooled)


PIPELINES: dict[str, tuple[Callable[[Any], np.ndarray], str]] = {
    "StableDiffusionPipeline": (text_to_image, "sd"),
    "StableDiffusionPipeline with AutoencoderTiny": (text_to_image, "tiny"),
    "StableDiffusionImg2ImgPipeline": (image_to_image, "sd"),
    "StableDiffusion3Pipeline": (stable_diffusion_3, "sd3"),
}


def vae_for(layout: str) -> Any:
    """A VAE whose factor the pipelines know."""
    small = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)} if layout == "tiny" else {}
    return autoencoder(layout, **small)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("quality", [pytest.param("exact", marks=pytest.mark.long), "high"])
def test_images_are_those_of_the_plain_pipeline(name: str, quality: str) -> None:
    run, layout = PIPELINES[name]
    plain, fused = vae_for(layout), vae_for(layout)
    expected = run(plain)
    found = run(tinysr_kernels.accelerate(fused, quality=quality))
    assert is_fused(fused.decoder)
    assert is_fused(fused.encoder) == ("Img2Img" in name)
    assert found.shape == expected.shape
    assert float(expected.std()) > 0.1
    assert float(np.abs(found - expected).max()) < ROUNDING


def test_a_pipeline_that_is_moved_between_dtypes() -> None:
    """As SDXL's pipelines do around decoding (`force_upcast`): the weights are folded for each."""
    vae = tinysr_kernels.accelerate(vae_for("sd"))
    first = text_to_image(vae)
    vae.to(torch.float64).to(torch.float32)
    assert np.array_equal(text_to_image(vae), first)


def test_offloading_a_whole_model() -> None:
    """A hook of accelerate's on the VAE itself runs before encode and decode, and moves the weights each time."""
    vae = tinysr_kernels.accelerate(vae_for("sd"))
    first = text_to_image(vae)
    for p in vae.parameters():  # another storage, as after two moves
        p.data = p.data.clone()
    assert np.array_equal(text_to_image(vae), first)
