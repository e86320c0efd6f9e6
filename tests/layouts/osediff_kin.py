"""Small PiSA-SR, HYPIR and OMGSR-S: Stable Diffusion's folder as for OSEDiff, and the LoRA as each saves it.

github.com/csslc/PiSA-SR (pisasr.py, `save_model`), github.com/XPixelGroup/HYPIR (HYPIR/trainer/base.py),
github.com/wuer5/OMGSR (train_omgsr_s.py; peft's `save_pretrained`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.reference.one_step.osediff import HYPIR, OMGSR_S, PISA_SR, Step, merge, one_step
from tests.layouts.osediff import Base, of_side, random_lora, write_base
from tests.layouts.weights import write_pickle, write_safetensors
from tinysr_kernels.families import ColorFix

PISA_FILE, HYPIR_FILE = "preset/models/pisa_sr.pkl", "HYPIR_sd2.pth"
UNET_ADAPTER, VAE_ADAPTER = "adapters/unet_lora_adapter", "adapters/vae_encoder_lora_adapter"
FILE = "adapter_model.safetensors"
RANKS = {"pix": 3, "sem": 2}
_HYPIR = [
    "to_k",
    "to_q",
    "to_v",
    "to_out.0",
    "conv",
    "conv1",
    "conv2",
    "conv_shortcut",
    "conv_out",
    "proj_in",
    "proj_out",
    "ff.net.2",
    "ff.net.0.proj",
]
_OMGSR = ["conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0"]
NAMES = ("pisa-sr", "hypir", "omgsr-s")


@dataclass
class Relative:
    """What was written, the networks that a loader must arrive at, and the step between them."""

    folder: Path
    base: Base
    step: Step
    lora: dict[str, Tensor]

    def upscale(self, image: Tensor, sizes: Any, color_fix: ColorFix, factor: int = 4) -> Tensor:
        """The reference result, [N,3,s*H,s*W], computed in the image's dtype."""
        unet, vae = self.base.unet.to(image.dtype), self.base.vae.to(image.dtype)
        return one_step(image, unet, vae, self.base.prompt.to(image.dtype), self.step, sizes, color_fix, factor)


def write_relative(folder: str | Path, name: str, *, weights: Sequence[float] = (1.0, 1.0), **base: Any) -> Relative:
    """Write all files of one relative. weights: of PiSA-SR's adapters, in the networks; base: see `write_base`."""
    folder = Path(folder)
    written = write_base(folder, amplified=6, **base)
    write = {"pisa-sr": _pisa, "hypir": _hypir, "omgsr-s": _omgsr}[name]
    return write(folder, written, weights)


def _pisa(folder: Path, base: Base, weights: Sequence[float]) -> Relative:
    lora: dict[str, Tensor] = {}
    state = base.unet.state_dict()
    for ending, rank in RANKS.items():
        lora |= random_lora(
            state, _not_time, rank, torch.float32, base.generator, lambda m, e=ending: f"{of_side(m)}_{e}"
        )
    content = {f"lora_rank_unet_{ending}": rank for ending, rank in RANKS.items()}
    for part in ("encoder", "decoder", "others"):
        content |= {f"unet_lora_{part}_modules_{ending}": ["conv_in"] for ending in RANKS}
    write_pickle(folder / PISA_FILE, content | {"state_dict_unet": lora})
    of = dict(zip(RANKS, weights, strict=True))
    base.unet.load_state_dict(merge(state, lora, 8, lambda adapter: of[adapter.removesuffix(".weight")[-3:]]))
    return Relative(folder, base, PISA_SR, lora)


def _not_time(name: str) -> bool:
    return not name.startswith("time_embedding.") and "time_emb_proj" not in name


def _targets(names: Sequence[str]) -> Any:
    """As peft matches a list of target modules: the whole name, or its end after a dot."""
    pattern = re.compile(rf"(^|\.)({'|'.join(map(re.escape, names))})\.weight$")
    return lambda name: pattern.search(name) is not None


def _hypir(folder: Path, base: Base, weights: Sequence[float]) -> Relative:
    state = base.unet.state_dict()
    lora = random_lora(state, _targets(_HYPIR), 4, torch.float32, base.generator, lambda _: ".default")
    write_pickle(folder / HYPIR_FILE, lora)
    base.unet.load_state_dict(merge(state, lora, 4))
    return Relative(folder, base, HYPIR, lora)


def _omgsr(folder: Path, base: Base, weights: Sequence[float]) -> Relative:
    halves = {
        UNET_ADAPTER: (base.unet, base.unet.state_dict(), 3, 6.0),
        VAE_ADAPTER: (base.vae.encoder, base.vae.encoder.state_dict(), 2, 3.0),
    }
    kept: dict[str, Tensor] = {}
    for name, (module, state, rank, alpha) in halves.items():
        lora = random_lora(state, _targets(_OMGSR), rank, torch.float32, base.generator, lambda _: "")
        write_safetensors(folder / name / FILE, {f"base_model.model.{k}": t for k, t in lora.items()})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": _OMGSR}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
        module.load_state_dict(merge(state, _with_adapter(lora), alpha))
        kept |= lora
    return Relative(folder, base, OMGSR_S, kept)


def _with_adapter(lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """`merge` wants an adapter's name between."""
    return {re.sub(r"\.lora_([AB])\.weight$", r".lora_\1.default.weight", name): t for name, t in lora.items()}
