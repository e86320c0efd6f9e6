"""OSEDiff (arXiv 2406.08177) and its relatives in plain PyTorch: the compiled models' oracle.

Follows github.com/cswry/OSEDiff (test_osediff.py, osediff.py) but for what pipelines.py says of all of them: no
rounding to 8 bits, padding where the script resamples. And the latent is the posterior's mean where the script draws a
sample, and the VAE runs whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.reference.kl_vae import KLVAE
from model.reference.pipelines import UPSCALE, adain, bicubic, pad_to, pillow_bicubic, predict, wavelet
from model.reference.sd_unet import SDUNet
from tinysr_kernels.families import ColorFix, OSEDiffConfig

TIMESTEP = 999.0
LORA_ALPHA = 8
"""peft's default, which the release stores nowhere."""
Weights = Callable[[str], float]
"""The weight of an adapter by what follows `.lora_A.` in its keys."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def merge(
    state: Mapping[str, Tensor],
    lora: Mapping[str, Tensor],
    alpha: float = LORA_ALPHA,
    weight_of: Weights = lambda _: 1.0,
) -> dict[str, Tensor]:
    """A module's state dict with a LoRA added: W += weight alpha/r B A for each adapter, in float32 or wider.

    `<module>.base_layer.*` replaces a weight before the updates of the module are added.
    """
    merged = dict(state)
    merged |= {name.replace(".base_layer.", "."): t for name, t in lora.items() if ".base_layer." in name}
    for name, a in lora.items():
        module, found, adapter = name.partition(".lora_A.")
        if found:
            b, weight = lora[f"{module}.lora_B.{adapter}"], merged[f"{module}.weight"]
            wide = torch.promote_types(weight.dtype, torch.float32)
            update = weight_of(adapter) * alpha / a.shape[0] * b.to(wide).flatten(1) @ a.to(wide).flatten(1)
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


@dataclass(frozen=True)
class Step:
    """A one-step model's way from the latent z to x0 = (z - noise * unet(z, timestep)) / signal.

    symmetric: windows are weighted by bells about (T-1)/2 on both axes. enlarge: the image, by a whole factor.
    """

    timestep: float
    signal: float
    noise: float
    symmetric: bool = False
    enlarge: Callable[[Tensor, int], Tensor] = pillow_bicubic


class Sizes(Protocol):
    """Of a configuration: the latent's scale; windows, their overlap and the smallest side in latent pixels."""

    @property
    def scaling_factor(self) -> float: ...
    @property
    def window(self) -> int: ...
    @property
    def overlap(self) -> int: ...
    @property
    def least(self) -> int: ...


def prediction(z: Tensor, unet: SDUNet, prompt: Tensor, step: Step, sizes: Sizes) -> Tensor:
    """The UNet's: the latent whole, or where it has more pixels than a window in windows of at most that."""
    height, width = z.shape[2:]
    if height * width <= sizes.window**2:
        return unet(z, step.timestep, prompt)
    side = min(sizes.window, height, width)
    return predict(z, lambda tile: unet(tile, step.timestep, prompt), side, sizes.overlap, step.symmetric)


@torch.no_grad()
def one_step(
    image: Tensor,
    unet: SDUNet,
    vae: KLVAE,
    prompt: Tensor,
    step: Step,
    sizes: Sizes,
    color_fix: ColorFix = "adain",
    upscale: int = UPSCALE,
) -> Tensor:
    """A one-step model on images [N,3,H,W] of any size, in the dtype of the networks. prompt: its embedding [1,T,X]."""
    height, width = image.shape[2:]
    factor = 2 ** (len(vae.encoder.down_blocks) - 1)
    multiple, least = factor // math.gcd(factor, upscale), math.ceil(sizes.least * factor / upscale)
    lr = pad_to(image, multiple, least)
    z = vae.encode(step.enlarge(lr, upscale) * 2 - 1) * sizes.scaling_factor
    x0 = (z - step.noise * prediction(z, unet, prompt, step, sizes)) / step.signal
    sr = vae.decode(x0 / sizes.scaling_factor)[..., : height * upscale, : width * upscale]
    sr = sr.clamp(-1, 1) / 2 + 0.5
    if color_fix == "adain":
        sr = adain(sr, pillow_bicubic(image, upscale))
    elif color_fix == "wavelet":
        sr = wavelet(sr, pillow_bicubic(image, upscale))
    return sr.clamp(0, 1)


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
    step = Step(TIMESTEP, math.sqrt(config.alpha), math.sqrt(1 - config.alpha))
    return one_step(image, unet, vae, prompt, step, config, color_fix, upscale)


# Relatives: PiSA-SR (pisasr.py), HYPIR (HYPIR/enhancer/sd2.py), OMGSR-S (infer/omgsr_s_infer_model.py)


def scheduled(timestep: int) -> tuple[float, float]:
    """(sqrt(a), sqrt(1-a)) of Stable Diffusion's noise schedule at a time step."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = float((1 - betas).cumprod(0)[timestep])
    return math.sqrt(alpha), math.sqrt(1 - alpha)


PISA_SR = Step(1.0, 1.0, 1.0, symmetric=True)
HYPIR = Step(200.0, *scheduled(200), enlarge=bicubic)
OMGSR_S = Step(273.0, *scheduled(273))
