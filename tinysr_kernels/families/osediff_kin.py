"""Relatives of OSEDiff: the same UNet and VAE, other LoRA, another time step, another way to the noise-free latent.

PiSA-SR (arXiv 2412.03017, github.com/csslc/PiSA-SR), HYPIR (arXiv 2507.20590, github.com/XPixelGroup/HYPIR) and
OMGSR-S (arXiv 2508.08227, github.com/wuer5/OMGSR). Read from their code; their weights were not at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.lora import Update, read_updates, states_alpha, summed
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.sd import kl_vae, scheduler, unet
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import ColorFix, Found
from tinysr_kernels.families.one_step_sd import Adaptation, Alpha, NoiseConfig, OneStepConfig, OneStepFamily, Window

_ALPHA_200, _ALPHA_273 = scheduler.alpha_of(200), scheduler.alpha_of(273)
_UNET_BLOCK = r"(down_blocks\.[0-9]+|up_blocks\.[0-9]+|mid_block)\."


# PiSA-SR

PISA = Part(
    "pisa-sr",
    "PiSA-SR's LoRA (keys state_dict_unet.*.default_*_pix.*, state_dict_unet.*.default_*_sem.*)",
    re.compile(r"^state_dict_unet\..*\.lora_[AB]\.default_[a-z]+_(pix|sem)\.weight$"),
    names=("pisa_sr", "pisa-sr"),
    lora=True,
)
ADAPTERS = {"pixel": "pix", "semantic": "sem"}
"""How the file calls them, at the end of an adapter's name."""


@dataclass(frozen=True)
class PiSASRConfig(OneStepConfig):
    """x0 = z - prediction; windows are blended by bells about their middle on both axes."""

    symmetric: ClassVar[bool] = True


class PiSASR(OneStepFamily[PiSASRConfig]):
    """Two adapters, of pixels and of semantics, both at peft's default lora_alpha, which the file does not state."""

    name = "pisa-sr"
    summary = "PiSA-SR's pisa_sr.pkl with the folder of Stable Diffusion 2.1-base"
    parts = (PISA, unet.UNET, kl_vae.KL_VAE)
    config_class = PiSASRConfig
    adapters = tuple(ADAPTERS)
    timestep, window, overlap, lora_alpha = 1, 96, 32, 8

    def adaptation(self, found: Found) -> Adaptation:
        """Both adapters of every module, each times its weight."""
        file, alpha = found.parts[PISA.role].file, self.scale_alpha(found)
        strengths = found.lora_weights or (1.0,) * len(ADAPTERS)
        known = re.compile(rf"\.default_[a-z]+_({'|'.join(ADAPTERS.values())})\.weight$")
        for key in file.tensors:
            if not (key.startswith("state_dict_unet.") and known.search(key)):
                raise CheckpointError(f"{file.where}: {quoted(key)}: unexpected beside PiSA-SR's adapters")
        parts = [read_updates(_adapter(file, adapter), alpha) for adapter in ADAPTERS.values()]
        weights = ", ".join(f"{name} {weight:g}" for name, weight in zip(ADAPTERS, strengths, strict=True))
        merged = f"LoRA {file.where} into the UNet, at scale {alpha:g} / rank, with weights {weights}"
        return Adaptation(merged, summed(parts, strengths))


def _adapter(file: TensorFile, ending: str) -> TensorFile:
    """The keys of one adapter; CheckpointError where there are none."""
    prefix = "state_dict_unet."
    own = {k.removeprefix(prefix): t for k, t in file.tensors.items() if k.endswith(f"_{ending}.weight")}
    if not own:
        raise CheckpointError(f"{file.where}: expected adapters default_*_{ending}, found none")
    return TensorFile(file.path / prefix[:-1], own)


# HYPIR

HYPIR_LORA = Part(
    "hypir",
    "HYPIR's LoRA (keys down_blocks.*.lora_A.default.weight)",
    re.compile(rf"^{_UNET_BLOCK}.*\.attn[12]\..*\.lora_[AB]\.default\.weight$"),
    lora=True,
)


@dataclass(frozen=True)
class HYPIRConfig(NoiseConfig):
    """The image is enlarged as PyTorch does, and not clamped."""

    window: Window = 64
    alpha: Alpha = _ALPHA_200
    pillow: ClassVar[bool] = False

    @property
    def color_fix(self) -> ColorFix:
        """The release's."""
        return "wavelet"


class HYPIR(OneStepFamily[HYPIRConfig]):
    """The UNet alone is adapted; alpha is the rank, 256."""

    name = "hypir"
    summary = "HYPIR's HYPIR_sd2.pth with the folder of Stable Diffusion 2.1-base"
    parts = (HYPIR_LORA, unet.UNET, kl_vae.KL_VAE)
    config_class = HYPIRConfig
    timestep, window, overlap, lora_alpha = 200, 64, 32, None

    def adaptation(self, found: Found) -> Adaptation:
        """Scale 1, unless the caller says otherwise."""
        file, alpha = found.parts[HYPIR_LORA.role].file, found.lora_alpha
        scale = "1" if alpha is None else f"{alpha:g} / rank"
        return Adaptation(f"LoRA {file.where} into the UNet, at scale {scale}", read_updates(file, alpha))


# OMGSR-S

OMGSR_UNET = Part(
    "omgsr-unet-lora",
    "OMGSR-S's LoRA of the UNet (unet_lora_adapter/)",
    re.compile(rf"^base_model\.model\.{_UNET_BLOCK}.*\.attn[12]\..*\.lora_[AB]\.weight$"),
    names=("unet_lora",),
    lora=True,
)
OMGSR_VAE = Part(
    "omgsr-vae-lora",
    "OMGSR-S's LoRA of the VAE's encoder (vae_encoder_lora_adapter/)",
    re.compile(r"^base_model\.model\.mid_block\.attentions\.0\.to_(q|k|v|out\.0)\.lora_[AB]\.weight$"),
    names=("vae_lora",),
    lora=True,
)


@dataclass(frozen=True)
class OMGSRConfig(NoiseConfig):
    """Of the release for 512 pixels."""

    window: Window = 64
    alpha: Alpha = _ALPHA_273


class OMGSR(OneStepFamily[OMGSRConfig]):
    """Two folders as peft saves adapters; their adapter_config.json state rank and alpha."""

    name = "omgsr-s"
    summary = "OMGSR-S's two adapter folders with the folder of Stable Diffusion 2.1-base"
    parts = (OMGSR_UNET, OMGSR_VAE, unet.UNET, kl_vae.KL_VAE)
    config_class = OMGSRConfig
    timestep, window, overlap, lora_alpha = 273, 64, 32, None

    def adaptation(self, found: Found) -> Adaptation:
        """The modules of the VAE's adapter are the encoder's."""
        files = [found.parts[part.role].file for part in (OMGSR_UNET, OMGSR_VAE)]
        of_unet, of_encoder = (_stated(file, found.lora_alpha) for file in files)
        merged = f"LoRA {files[0].where} into the UNet and {files[1].where} into the VAE's encoder, at alpha / rank"
        return Adaptation(merged, of_unet, {f"encoder.{module}": update for module, update in of_encoder.items()})


def _stated(file: TensorFile, alpha: float | None) -> dict[str, Update]:
    """The updates at the scale that is stated beside the file; CheckpointError where it is nowhere stated."""
    if alpha is None and not states_alpha(file):
        raise CheckpointError(
            f"{file.where}: expected adapter_config.json with r and lora_alpha beside it, found none; put the file "
            "there that was saved with it, or pass lora_alpha="
        )
    return read_updates(file, alpha)
