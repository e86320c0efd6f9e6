"""TinySR (arXiv 2508.17434), as released: a pruned SD3 transformer between the halves of a tiny VAE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from tinysr_kernels import nets
from tinysr_kernels.checkpoint import transformer, vae
from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.plain import is_a, module_config
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sources import FoundPart, candidates, mapping_file
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Adain, Checkpoint, ColorFix, Family, Found
from tinysr_kernels.families.config import Blocks, Within, checked_config
from tinysr_kernels.nets import LatentNetwork, fp8, tiny_vae, tinysr_dit

TRANSFORMER = Part(
    "transformer",
    "a TinySR transformer (keys transformer_blocks.*, pos_embed.*)",
    re.compile(r"^([a-z_]+\.){0,3}transformer_blocks\.[0-9]+\.(attn\.to_q|norm1\.linear|ff\.net)\."),
    class_name="TinySD3Transformer2DModel",
)
VAE = vae.TINY_VAE
VAE_HALVES = r"(?:encoder|decoder)\.layers\."


@dataclass(frozen=True)
class TinySRConfig:
    """What TinySR's weights leave open; widths, depths and the number of heads are in their shapes."""

    head_dim: int = 64
    patch_size: Annotated[int, Within(1, transformer.WINDOW)] = 2
    encoder_blocks: Blocks = (1, 3, 3, 3)
    decoder_blocks: Blocks = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    overlap: int = 8
    """Latent pixels that neighboring windows of the transformer share per axis."""

    @property
    def color_fix(self) -> ColorFix:
        """The release's."""
        return "adain"


class TinySR(Family[TinySRConfig]):
    """Recognized by its transformer's keys; transformer and VAE have a config.json each."""

    name = "tinysr-dit"
    summary = "a TinySR folder (transformer, VAE, embeddings)"
    parts = (TRANSFORMER, VAE)
    config_class = TinySRConfig
    quantizations: ClassVar[Mapping[str, str]] = {"fp8": "transformer"}
    adain = Adain(eps=1e-5, least=0.0, clamp=True)
    takes_lora = True
    takes_embeddings = True

    def split(self, whole: FoundPart, module: nn.Module, label: str) -> dict[str, FoundPart]:
        """Transformer and VAE may be sub-modules of any name; each may have a `config` of its own."""
        names = list(whole.file.tensors)
        blocks = _prefix(names, r"^(.*?)transformer_blocks\.[0-9]+\.")
        halves = _prefix(names, rf"^(.*?){VAE_HALVES}[0-9]+\.")
        if blocks is None or halves is None:
            raise CheckpointError(
                f"{label}: expected the keys of a whole TinySR (transformer_blocks.*, encoder.layers.*, "
                f"decoder.layers.*), found {listed(names, 4)}"
            )
        is_half = re.compile(re.escape(halves) + VAE_HALVES)
        of_vae = [name for name in names if is_half.match(name)]
        of_transformer = [name for name in names if not is_half.match(name)]
        return {
            TRANSFORMER.role: _sub_part(whole, module, blocks, of_transformer, label),
            VAE.role: _sub_part(whole, module, halves, of_vae, label),
        }

    def read(self, found: Found) -> Checkpoint:
        """Transformer with its LoRA merged and its modulation evaluated, and VAE; both hold the same latents."""
        main, half = found.parts[TRANSFORMER.role], found.parts[VAE.role]
        stated = next((part.own for part in (main, half) if is_a(part.own, TinySRConfig)), None)
        if stated is not None:
            stated = checked_config(TinySRConfig, stated, main.config_where)
        if stated is None and (main.config is None or half.config is None):
            found.notices.append(
                "a part has no configuration: head width 64, VAE blocks (1,3,3,3) and (3,3,3,1), scale 1 assumed"
            )
        config = stated or TinySRConfig()
        layout = vae.TinyLayout(config.encoder_blocks, config.decoder_blocks, config.scaling_factor)
        if half.config is not None:
            layout = vae.layout_from_config(half.config, half.config_where)
        values = main.config
        if values is None:
            values = {"attention_head_dim": config.head_dim, "patch_size": config.patch_size}
        parts = transformer.Parts(
            main.file, values, main.config_where, found.lora, candidates(found.named), candidates(found.beside)
        )
        tensors, size = transformer.normalize(parts, found.notices)
        weights = Weights(_vae_tensors(half.file), half.file.where)
        latent = vae.check_tiny_vae(weights, layout)
        if latent != size.channels:
            raise CheckpointError(
                f"{half.file.where}: expected {size.channels} latent channels, as the transformer {main.file.where} "
                f"has, found {quoted(latent)}"
            )
        config = replace(
            config,
            head_dim=size.head_dim,
            patch_size=size.patch,
            encoder_blocks=layout.encoder_blocks,
            decoder_blocks=layout.decoder_blocks,
            scaling_factor=layout.scaling_factor,
        )
        named = {f"transformer.{name}": value for name, value in tensors.items()}
        merged = [f"LoRA {found.lora.where} into the transformer"] if found.lora is not None else []
        return Checkpoint(
            self.name, config, named | weights.finish(), notices=found.notices, merged=merged, source=found.source
        )

    def fold(self, config: TinySRConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Modulation and gates into the transformer's linears, range maps and the latent scale into the VAE."""
        return {
            **tinysr_dit.fold(tensors, dtype),
            **tiny_vae.fold_encoder(tensors, dtype, config.encoder_blocks, config.scaling_factor),
            **tiny_vae.fold_decoder(tensors, dtype, config.decoder_blocks),
        }

    def build(self, config: TinySRConfig, folded: Mapping[str, Tensor]) -> LatentNetwork:
        """Windows of the transformer's one size, as large as its position table."""
        encoder = tiny_vae.Encoder(folded, config.encoder_blocks)
        kind = fp8.Transformer if fp8.is_fp8(folded) else tinysr_dit.Transformer
        middle = kind(folded, config.head_dim, config.patch_size)
        return LatentNetwork(
            encoder,
            middle,
            tiny_vae.Decoder(folded, config.decoder_blocks, config.scaling_factor),
            factor=encoder.factor,
            window=middle.window,
            overlap=config.overlap,
            halo=max(tiny_vae.halo(config.encoder_blocks), tiny_vae.halo(config.decoder_blocks[::-1])),
        )

    def quantize(self, folded: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
        """The linears of the transformer's blocks in e4m3. InputError for widths that do not allow it."""
        return fp8.to_fp8(folded)

    def folds(self, folded: Mapping[str, Tensor]) -> list[str]:
        """Also the modulation and its gates, in whichever way they were folded."""
        gates = sum(name.endswith((".out.weight", ".ff2.weight")) for name in folded)
        apart = sum(name.endswith(".gate") for name in folded)
        found = ["modulation (shift, scale) into the linears that follow"]
        if gates > apart:
            found.append(f"{gates - apart} gates into the linears before them")
        if apart:
            found.append(f"{apart} gates kept apart, too small for half precision")
        return [*found, "the patch projection's bias into the position table", *nets.folds(folded)]


def _prefix(names: list[str], pattern: str) -> str | None:
    return next((found[1] for name in names if (found := re.match(pattern, name))), None)


def _sub_part(whole: FoundPart, module: nn.Module, prefix: str, names: list[str], label: str) -> FoundPart:
    """The tensors of one part without their prefix, and the part's configuration if it has one of its own."""
    tensors = {name.removeprefix(prefix): whole.file.tensors[name] for name in names}
    values, own = _config_of(module, prefix, label) if prefix else (None, None)
    stated = own if isinstance(own, TinySRConfig) else whole.own
    return FoundPart(mapping_file(tensors, label), values, f"{label}: {prefix}config", stated)


def _config_of(module: nn.Module, prefix: str, label: str) -> tuple[dict[str, Any] | None, Any]:
    """The configuration of a sub-module; none where the state dict has names that no sub-module goes with."""
    part: Any = module
    for name in prefix[:-1].split("."):
        part = getattr(part, "_modules", {}).get(name)
    return module_config(part, label) if part is not None else (None, None)


def _vae_tensors(file: TensorFile) -> dict[str, Tensor]:
    """Without what wraps every key alike: `module.` of DataParallel, `vae.` of a pipeline."""
    tensors = file.only_tensors()
    for prefix in ("module.", "vae."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors
