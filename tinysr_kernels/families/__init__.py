"""The registry of model families, and what is asked of all of them at once.

A family is a class in a file of its own here and a line in `FAMILIES`; `base.py` says what the class has. Families
build on `checkpoint/` (reading) and `nets/` (networks), and only `runtime/` and what is above it builds on families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.read.weights import check_finite
from tinysr_kernels.errors import CheckpointError, InputError
from tinysr_kernels.families.adcsr import AdcSR
from tinysr_kernels.families.base import COLOR_FIXES, Adain, Checkpoint, ColorFix, Config, Family, Found
from tinysr_kernels.families.config import config_from_values, config_to_dict
from tinysr_kernels.families.loading import Loader, roles_of
from tinysr_kernels.families.osediff import OSEDiff, OSEDiffConfig
from tinysr_kernels.families.osediff_kin import HYPIR, OMGSR, PiSASR
from tinysr_kernels.families.tinysr_dit import TinySR, TinySRConfig
from tinysr_kernels.families.tinysr_unet import TinySRUNet, UNetConfig
from tinysr_kernels.families.tsd_sr import TSDSR, TSDSRConfig
from tinysr_kernels.nets import Network

FAMILIES: dict[str, Family[Any]] = {
    TinySR.name: TinySR(),
    AdcSR.name: AdcSR(),
    TinySRUNet.name: TinySRUNet(),
    OSEDiff.name: OSEDiff(),
    PiSASR.name: PiSASR(),
    HYPIR.name: HYPIR(),
    OMGSR.name: OMGSR(),
    TSDSR.name: TSDSR(),
}
"""Every family by its name. Where the keys of one file suit several, the first in this order has it."""

__all__ = [
    "COLOR_FIXES",
    "FAMILIES",
    "Adain",
    "Checkpoint",
    "ColorFix",
    "Config",
    "Family",
    "Found",
    "OSEDiffConfig",
    "TSDSRConfig",
    "TinySRConfig",
    "UNetConfig",
    "build",
    "check_built",
    "check_quantize",
    "config_from_dict",
    "config_to_dict",
    "fold",
    "load",
    "role_of",
]


def load(
    ckpt: Any,
    *,
    embeddings: Any = None,
    prompt: str | None = None,
    lora_alpha: float | None = None,
    lora_weights: tuple[float, ...] | None = None,
) -> Checkpoint:
    """Find, read, check and normalize a checkpoint of any family.

    ckpt: one of
        "demo"                      the small checkpoint inside the package;
        a path (str or PathLike)    a folder searched by content, a file, or an index of shards;
        a dict of parts             for a family of several parts, by the names of its `parts`, such as {"transformer",
                                    "vae"[, "lora"][, "embeddings"]} for TinySR, {"unet" or "net_params", "decoder"} for
                                    AdcSR and {"osediff", "unet", "vae"[, "embeddings"]} for OSEDiff, {"transformer",
                                    "vae", "lora", "vae_lora"[, "embeddings"]} for TSD-SR; each a path to a file or
                                    folder, an nn.Module or a dict of tensors (where a config.json belongs to
                                    it, that lies beside the file or is the module's `config`);
        an nn.Module                of any family, by its keys; its `config` may be the family's configuration, and for
                                    a pruned UNet (unet., decoder.) has to be a UNetConfig.
    embeddings: takes precedence over the checkpoint's own: a tensor, a path to a file or folder, a dict name -> tensor
        or path, or a sequence of these. Pooled prompt [1,P], temb [1,D], position table [1,T,D] for TinySR; temb [1,E]
        or `<resnet>.time_bias` [C] for tinysr-unet. Prompt [1,T,X] or [T,X] for OSEDiff and its relatives.
    prompt: a text for families with a text encoder. lora_alpha: of a LoRA that adapts Stable Diffusion, before what its
        family or its files say. lora_weights: of PiSA-SR's two adapters, (pixel, semantic).

    Returns tensors on the CPU in their stored dtype, except what was merged or evaluated (float32 or wider).
    Raises CheckpointError for whatever is missing, damaged, refused, ambiguous or contradictory.
    """
    return Loader(FAMILIES, prompt, lora_alpha, lora_weights).load(ckpt, embeddings)


def role_of(file: Any) -> str:
    """What a `TensorFile` is by its content: a part's role, or one of `checkpoint.detect.DESCRIPTIONS`."""
    return roles_of(FAMILIES).of(file)


def config_from_dict(family: str, values: dict[str, Any]) -> Any:
    """Rebuild a family's configuration from JSON values.

    Raises ValueError naming the field when one is unknown, has the wrong type or a value outside its choices.
    """
    return config_from_values(FAMILIES[family].config_class, values)


def fold(
    family: str, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype, quantize: str | None = None
) -> dict[str, Tensor]:
    """Fold what a family's `read` gave for one compute dtype: matrices in it, vectors in float32 or wider.

    With `quantize` the folded tensors are quantized from float64, and what is not quantized stays so for `nets.place`.
    InputError where the family has no such quantized form.
    """
    if quantize is None:
        return FAMILIES[family].fold(config, tensors, dtype)
    check_quantize(family, quantize)
    return FAMILIES[family].quantize(FAMILIES[family].fold(config, tensors, torch.float64), quantize)


def build(family: str, config: Any, folded: Mapping[str, Tensor]) -> Network:
    """A family's network over folded tensors. KeyError names a tensor that is missing."""
    return FAMILIES[family].build(config, folded)


def check_built(network: Network, folded: Mapping[str, Tensor], source: str, dtype: torch.dtype) -> None:
    """CheckpointError unless a network holds every one of its folded tensors and all are finite in `dtype`.

    What `read` checked is finite as stored, and may overflow when constants are multiplied in or when it is rounded.
    """
    used = {id(tensor) for tensor in network.buffers()}
    left = [name for name, tensor in folded.items() if id(tensor) not in used]
    if left:
        raise CheckpointError(f"{source}: {listed(left)}: unexpected, they have no place in this network")
    for name, buffer in network.named_buffers():
        if buffer.is_meta:  # a network to be traced has no values
            continue
        try:
            check_finite(buffer, "")
        except CheckpointError as error:
            kind = str(dtype).removeprefix("torch.")
            wider = {"float16": "bfloat16", "float64": None}.get(kind, "float64")
            remedy = f"use dtype={wider!r}" if wider else "its weights are too large for any dtype"
            raise CheckpointError(
                f"{source}: {quoted(name)}: not finite once folded and rounded to {kind}; {remedy}"
            ) from error


def check_quantize(family: str, quantize: str) -> None:
    """InputError unless networks of the family have this quantized form."""
    if quantize not in FAMILIES[family].quantizations:
        able = ((name, one.quantizations.get(quantize)) for name, one in FAMILIES.items())
        listed = ", ".join(f"{name}'s {part}" for name, part in able if part) or "no family yet"
        raise InputError(f"quantize={quantize!r} is for {listed}, this checkpoint is {family}; use quantize=None")
