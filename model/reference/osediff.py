"""OSEDiff (arXiv 2406.08177) in plain PyTorch, from an image to one four times as large: the compiled model's oracle.

Follows github.com/cswry/OSEDiff (test_osediff.py, osediff.py) but for what pipelines.py says of all of them: no
rounding to 8 bits, padding where the script resamples. And the latent is the posterior's mean where the script draws a
sample, and the VAE runs whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from model.reference.kl_vae import KLVAE
from model.reference.pipelines import UPSCALE, adain, pad_to, pillow_bicubic, predict, wavelet
from model.reference.sd_unet import SDUNet
from tinysr_kernels.families import ColorFix, OSEDiffConfig

TIMESTEP = 999.0
LORA_ALPHA = 8
"""peft's default, which the release stores nowhere."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def merge(state: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state dict with one of the two in osediff.pkl added: W += 8/r B A, in float32 or wider.

    `<module>.base_layer.*` replaces a weight before the update of the module is added.
    """
    merged = dict(state)
    merged |= {name.replace(".base_layer.", "."): t for name, t in lora.items() if ".base_layer." in name}
    for name, a in lora.items():
        module, found, adapter = name.partition(".lora_A.")
        if found:
            b, weight = lora[f"{module}.lora_B.{adapter}"], merged[f"{module}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            update = LORA_ALPHA / a.shape[0] * b.to(wide).flatten(1) @ a.to(wide).flatten(1)
            merged[f"{module}.weight"] = weight.to(wide) + update.reshape(weight.shape)
    return merged


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's state dict with today's names of its attention, as matrices."""
    renamed = {}
    for name, tensor in state.items():
        if ".attentions." in name:
            for old, new in OLD_ATTENTION.items():
                name = name.replace(f".{old}.", f".{new}.")
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        renamed[name] = tensor
    return renamed


def noise(z: Tensor, unet: SDUNet, prompt: Tensor, config: OSEDiffConfig) -> Tensor:
    """The UNet's prediction: the latent whole, or where it has more pixels than a window in windows of at most that."""
    height, width = z.shape[2:]
    if height * width <= config.window**2:
        return unet(z, TIMESTEP, prompt)
    return predict(z, lambda tile: unet(tile, TIMESTEP, prompt), min(config.window, height, width), config.overlap)


@torch.no_grad()
def osediff(
    image: Tensor,
    unet: SDUNet,
    vae: KLVAE,
    prompt: Tensor,
    config: OSEDiffConfig,
    color_fix: ColorFix = "adain",
    upscale: int = UPSCALE,
) -> Tensor:
    """OSEDiff on images [N,3,H,W] of any size, in the dtype of the networks. prompt: its embedding [1,T,X]."""
    height, width = image.shape[2:]
    factor = 2 ** (len(vae.encoder.down_blocks) - 1)
    multiple, least = factor // math.gcd(factor, upscale), math.ceil(config.least * factor / upscale)
    lr = pad_to(image, multiple, least)
    z = vae.encode(pillow_bicubic(lr, upscale) * 2 - 1) * config.scaling_factor
    eps = noise(z, unet, prompt, config)
    x0 = (z - math.sqrt(1 - config.alpha) * eps) / math.sqrt(config.alpha)
    sr = vae.decode(x0 / config.scaling_factor)[..., : height * upscale, : width * upscale]
    sr = sr.clamp(-1, 1) / 2 + 0.5
    if color_fix == "adain":
        sr = adain(sr, pillow_bicubic(image, upscale))
    elif color_fix == "wavelet":
        sr = wavelet(sr, pillow_bicubic(image, upscale))
    return sr.clamp(0, 1)
