"""OSEDiff (arXiv 2406.08177), as released: Stable Diffusion 2.1-base, and a LoRA with a trained conv_in beside it.

osediff.pkl holds `state_dict_unet` and `state_dict_vae`, low-rank updates of every convolution and projection of the
UNet and of the VAE's encoder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.lora import Update, read_updates
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.sd import kl_vae, unet
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Found
from tinysr_kernels.families.one_step_sd import Adaptation, NoiseConfig, OneStepFamily

LORA = Part(
    "osediff",
    "OSEDiff's LoRA (keys state_dict_unet.*, state_dict_vae.*)",
    re.compile(r"^state_dict_(unet|vae)\..*\.lora_[AB]\.default_[a-z]+\.weight$"),
    lora=True,
)
REPLACED = "conv_in.base_layer."
"""The UNet's first convolution as trained, which replaces the base model's before its own update is added."""


@dataclass(frozen=True)
class OSEDiffConfig(NoiseConfig):
    """OSEDiff's configuration."""


class OSEDiff(OneStepFamily[OSEDiffConfig]):
    """peft's default lora_alpha is 8, with which it was trained and which the file does not state."""

    name = "osediff"
    summary = "OSEDiff's osediff.pkl with the folder of Stable Diffusion 2.1-base"
    parts = (LORA, unet.UNET, kl_vae.KL_VAE)
    config_class = OSEDiffConfig
    timestep, window, overlap, lora_alpha = 999, 96, 32, 8

    def adaptation(self, found: Found) -> Adaptation:
        """Both state dicts of the file."""
        file, alpha = found.parts[LORA.role].file, self.scale_alpha(found)
        of_unet, replaced = _half(file, "unet", alpha)
        of_vae, _ = _half(file, "vae", alpha)
        left = [key for key in file.tensors if not key.startswith(("state_dict_unet.", "state_dict_vae."))]
        if left:
            raise CheckpointError(
                f"{file.where}: {quoted(min(left))}: unexpected, OSEDiff has state_dict_unet and _vae"
            )
        for part in ("weight", "bias"):
            if f"conv_in.{part}" not in replaced:
                raise CheckpointError(
                    f"{file.where}: {REPLACED}{part}: expected in state_dict_unet, found {listed(replaced) or 'none'}"
                )
        merged = f"LoRA {file.where} into the UNet and the VAE's encoder, at scale {alpha:g} / rank"
        return Adaptation(merged, of_unet, of_vae, replaced)


def _half(file: TensorFile, name: str, alpha: float | None) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """The updates of "unet" or "vae" by module, and the base model's weights that the file replaces."""
    prefix = f"state_dict_{name}."
    own = {key[len(prefix) :]: tensor for key, tensor in file.tensors.items() if key.startswith(prefix)}
    if not own:
        raise CheckpointError(f"{file.where}: {prefix[:-1]}: expected the LoRA of the {name}, found none")
    replaced = {key: own.pop(key) for key in list(own) if name == "unet" and key.startswith(REPLACED)}
    updates = read_updates(TensorFile(file.path / prefix[:-1], own), alpha)
    return updates, {key.replace(REPLACED, "conv_in."): tensor for key, tensor in replaced.items()}
