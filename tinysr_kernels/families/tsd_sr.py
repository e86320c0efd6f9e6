"""TSD-SR (arXiv 2411.18263), as released: Stable Diffusion 3 with two LoRA, one for the transformer, one for the VAE.

The base model is a folder of diffusers' (transformer, VAE, text encoders, which are not read). Both LoRA files carry
their keys under `transformer.`; the modules tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels import nets
from tinysr_kernels.checkpoint import modulation
from tinysr_kernels.checkpoint.detect import LORA, Folder, Part
from tinysr_kernels.checkpoint.lora import Merged, read_updates
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sd import kl_vae
from tinysr_kernels.checkpoint.sd3 import prompt, transformer
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Adain, Checkpoint, ColorFix, Family, Found
from tinysr_kernels.families.config import Within
from tinysr_kernels.nets.diffusion import sd3

VAE_LORA = Part(
    "vae-lora",
    "TSD-SR's LoRA of the VAE (keys transformer.encoder.*.lora_A.weight)",
    re.compile(r"^(?!state_dict_)([a-z_]+\.){0,3}encoder\.(down_blocks|mid_block|conv_in|conv_out)\b.*\.lora_[AB]\."),
    names=("vae_lora",),
    lora=True,
)
WINDOW, OVERLAP = 64, 8
"""In latent pixels: side of the transformer's windows, and what neighbors share."""


@dataclass(frozen=True)
class TSDSRConfig:
    """What TSD-SR's folded weights leave open; the window is in the position table."""

    head_dim: int = 64
    patch_size: Annotated[int, Within(1, WINDOW)] = 2
    scaling_factor: float = 1.5305
    vae_groups: tuple[int, ...] = (32,)
    overlap: Annotated[int, Within(1, 512)] = OVERLAP

    @property
    def color_fix(self) -> ColorFix:
        """The release's."""
        return "wavelet"


class TSDSR(Family[TSDSRConfig]):
    """Recognized by the VAE's LoRA; the base model's transformer and VAE have a config.json each."""

    name = "tsd-sr"
    summary = "TSD-SR's two LoRA with the folder of Stable Diffusion 3 and its embeddings"
    parts = (VAE_LORA, transformer.SD3, kl_vae.KL_VAE)
    config_class = TSDSRConfig
    adain = Adain(eps=1e-5, least=0.0, clamp=True)
    takes_lora = True
    takes_embeddings = True

    def select(self, folder: Folder, main: TensorFile) -> None:
        """CheckpointError where the transformer's LoRA or the base model is not there."""
        wanted = {
            LORA: "TSD-SR's LoRA of the transformer",
            transformer.SD3.role: transformer.SD3.description,
            kl_vae.KL_VAE.role: "the VAE of the same model",
        }
        missing = [what for role, what in wanted.items() if not folder.of(role)]
        if missing:
            raise CheckpointError(
                f"{folder.path}: {main.where} is TSD-SR's LoRA of the VAE, without {' and '.join(missing)}; put the "
                "folder of Stable Diffusion 3, as diffusers writes it, and both LoRA into one folder, or pass "
                '{"vae_lora": ..., "transformer": ..., "vae": ..., "lora": ..., "embeddings": ...}'
            )

    def read(self, found: Found) -> Checkpoint:
        """Both modules with their LoRA, and the time step and the prompt evaluated."""
        of_vae, base, half = (found.parts[part.role] for part in self.parts)
        if found.lora is None:
            raise CheckpointError(
                f'{found.source}: expected TSD-SR\'s LoRA of the transformer, found none; pass it as "lora"'
            )
        size = transformer.size_from_config(base.config or {}, base.config_where)
        layout = kl_vae.layout_from_config(half.config or {}, half.config_where)
        if layout.latent != size.channels or layout.quant or layout.post_quant:
            raise CheckpointError(
                f"{half.config_where}: expected Stable Diffusion 3's VAE, {size.channels} latent channels without "
                f"use_quant_conv and use_post_quant_conv, found {layout.latent}, {layout.quant} and {layout.post_quant}"
            )
        text, pooled = prompt.embeddings(found.named, found.beside, size.prompt, size.pooled, found.source)
        weights = Weights(base.file.only_tensors(), base.file.where)
        table = transformer.table(weights, size, WINDOW, found.notices)
        transformer.check(weights, size)
        network = Merged(weights.finish(), read_updates(found.lora))
        vae = Merged(kl_vae.checked(half.file, layout), read_updates(of_vae.file))
        config = TSDSRConfig(size.head_dim, size.patch, layout.scaling_factor, (layout.groups,), OVERLAP)
        merged = [
            f"LoRA {found.lora.where} into the transformer",
            f"LoRA {of_vae.file.where} into the VAE's encoder",
        ]
        tensors = _Normalized(network, vae, size, table, text, pooled)
        return Checkpoint(self.name, config, tensors, notices=found.notices, merged=merged, source=found.source)

    def fold(self, config: TSDSRConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The modulation of both streams, the text where it is constant, range maps and the latent's scale."""
        return sd3.fold(tensors, config, dtype)

    def build(self, config: TSDSRConfig, folded: Mapping[str, Tensor]) -> sd3.OneStepSD3:
        """The low-resolution image whole, or in blended tiles; the transformer in windows of its latent."""
        return sd3.OneStepSD3(folded, config)

    def folds(self, folded: Mapping[str, Tensor]) -> list[str]:
        """Also the modulation, its gates, and the text's constants."""
        apart = sum(name.endswith(".gate") for name in folded)
        kept = [f"{apart} gates kept apart, too small for half precision"] if apart else []
        return [
            "modulation (shift, scale, gate) of image and text into the linears around it",
            *kept,
            "the text's queries, keys and values in the first block, which are constants",
            "the patch projection's bias into the position table",
            "range map and the latent's scale into the VAE's first and last convolutions",
            *nets.folds(folded),
        ]


class _Normalized(Mapping[str, Tensor]):
    """The tensors as `fold` expects them, each merged and evaluated when it is asked for.

    `transformer.*` with `modulation` and `context_modulation`, [6,D] or [2,D], in place of the linears that make them,
    `transformer.context` [T,D] in place of the prompt's projection, and the position table of one window; `encoder.*`,
    `decoder.*`.
    """

    def __init__(
        self,
        network: Mapping[str, Tensor],
        vae: Mapping[str, Tensor],
        size: transformer.Size,
        table: Tensor,
        text: Tensor,
        pooled: Tensor,
    ) -> None:
        self._network, self._vae, self._dim = network, vae, size.dim
        self._constant = {transformer.TABLE: table}
        embedders = {k: network[k] for k in network if k.startswith(f"{modulation.EMBEDDER}.")}
        self._temb = F.silu(modulation.embed(embedders, pooled))
        context = self._evaluated("context_embedder", text.double())
        self._constant["context"] = context.to(torch.promote_types(text.dtype, torch.float32))
        self._linears: dict[str, str] = {}
        """What is evaluated, and the linear that makes it of the time step's and the pooled prompt's embedding."""
        kept = [name for name in network if name not in self._constant and not _is_conditioning(name)]
        for name in network:
            for norm, what in (("norm1", "modulation"), ("norm1_context", "context_modulation")):
                if name.endswith(f".{norm}.linear.weight"):
                    self._linears[name.replace(f"{norm}.linear.weight", what)] = name.removesuffix(".weight")
        self._linears["norm_out.modulation"] = "norm_out.linear"
        last = f"transformer_blocks.{size.depth - 1}.attn.add_q_proj."
        own = [*self._constant, *self._linears, *(name for name in kept if not name.startswith(last))]
        self._names = [*(f"transformer.{name}" for name in own), *vae]
        self._known = frozenset(self._names)

    def _evaluated(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._network[f"{name}.weight"].double(), self._network[f"{name}.bias"].double())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            raise KeyError(name)
        if not name.startswith("transformer."):
            return self._vae[name]
        name = name.removeprefix("transformer.")
        if name in self._constant:
            return self._constant[name]
        if name in self._linears:
            value = self._evaluated(self._linears[name], self._temb).reshape(-1, self._dim)
            wide = torch.promote_types(self._network[f"{self._linears[name]}.weight"].dtype, torch.float32)
            return value.to(wide)
        return self._network[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _is_conditioning(name: str) -> bool:
    """Whether a tensor's module is evaluated while the checkpoint is read."""
    return name.startswith((f"{modulation.EMBEDDER}.", "context_embedder.")) or ".linear." in f".{name}"
