"""TSD-SR (arXiv 2411.18263) in plain PyTorch, from an image to one four times as large: the compiled model's oracle.

Follows github.com/Microtreei/TSD-SR (test/test_tsdsr.py) but for what pipelines.py says of all of them: no rounding to
8 bits, padding where the script resamples. And the latent is the posterior's mean where the script draws a sample, and
the VAE runs whole. The VAE's shift_factor is not applied, as in the script.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.reference.kl_vae import KLVAE
from model.reference.pipelines import UPSCALE, adain, bicubic, pad_to, pillow_bicubic, predict, wavelet
from model.reference.sd3_transformer import SD3Transformer
from tinysr_kernels.families import ColorFix, TSDSRConfig

WINDOW = 64
"""Latent pixels per side that the transformer was trained for."""
PREFIX = "transformer."


def merge(state: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state dict with its LoRA added: W += B A, in float32 or wider. Both files have the one prefix."""
    merged = dict(state)
    for name, a in lora.items():
        module, found, _ = name.removeprefix(PREFIX).partition(".lora_A.")
        if found:
            b, weight = lora[f"{PREFIX}{module}.lora_B.weight"], merged[f"{module}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            update = b.to(wide).flatten(1) @ a.to(wide).flatten(1)
            merged[f"{module}.weight"] = weight.to(wide) + update.reshape(weight.shape)
    return merged


@torch.no_grad()
def tsd_sr(
    image: Tensor,
    transformer: SD3Transformer,
    vae: KLVAE,
    prompt: Tensor,
    pooled: Tensor,
    config: TSDSRConfig,
    color_fix: ColorFix = "wavelet",
    upscale: int = UPSCALE,
    window: int = WINDOW,
) -> Tensor:
    """TSD-SR on images [N,3,H,W] of any size, in the dtype of the networks.

    prompt, pooled: the embeddings of one prompt, [1,T,J] and [1,L].
    """
    height, width = image.shape[2:]
    factor = 2 ** (len(vae.encoder.down_blocks) - 1)
    multiple = factor // math.gcd(factor, upscale)
    lr = pad_to(image, multiple, math.ceil(window * factor / upscale))
    z = vae.encode((bicubic(lr, upscale) * 2 - 1).clamp(-1, 1)) * config.scaling_factor
    z = z - predict(z, lambda tile: transformer(tile, prompt, pooled), window, config.overlap)
    sr = vae.decode(z / config.scaling_factor)[..., : height * upscale, : width * upscale]
    sr = sr.clamp(-1, 1) / 2 + 0.5
    if color_fix == "adain":
        sr = adain(sr, image)
    elif color_fix == "wavelet":
        sr = wavelet(sr, pillow_bicubic(image, upscale))
    return sr.clamp(0, 1)
