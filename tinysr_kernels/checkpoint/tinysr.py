"""TinySR (family `tinysr-dit`): a transformer and a tiny VAE, checked and normalised (arXiv 2508.17434)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinysr_kernels.checkpoint import transformer, vae
from tinysr_kernels.checkpoint.embeddings import Candidate
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.result import Checkpoint
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import TinySRConfig


@dataclass
class TinySRParts:
    """The parts as found. A configuration is config.json's content, or None with `own` for a module that has none."""

    transformer: TensorFile
    transformer_config: dict[str, Any] | None
    transformer_config_where: str
    vae: TensorFile
    vae_config: dict[str, Any] | None
    vae_config_where: str
    lora: TensorFile | None = None
    given: Sequence[Candidate] = ()
    found: Sequence[Candidate] = ()
    own: TinySRConfig | None = None


def build(parts: TinySRParts, source: str, notices: list[str]) -> Checkpoint:
    """Check and normalise TinySR; raises CheckpointError naming file, key, expected and found."""
    own = parts.own or TinySRConfig()
    layout = vae.TinyLayout(own.encoder_blocks, own.decoder_blocks, own.scaling_factor)
    if parts.vae_config is not None:
        layout = vae.layout_from_config(parts.vae_config, parts.vae_config_where)
    values = parts.transformer_config
    if values is None:
        values = {"attention_head_dim": own.head_dim, "patch_size": own.patch_size}
    tensors, size = transformer.normalise(
        transformer.Parts(
            parts.transformer, values, parts.transformer_config_where, parts.lora, parts.given, parts.found
        ),
        notices,
    )
    weights = Weights(_vae_tensors(parts.vae), parts.vae.where)
    latent = vae.check_tiny_vae(weights, layout)
    if latent != size.channels:
        raise CheckpointError(
            f"{parts.vae.where}: expected {size.channels} latent channels, as the transformer "
            f"{parts.transformer.where} has, found {quoted(latent)}"
        )
    config = replace(
        own,
        head_dim=size.head_dim,
        patch_size=size.patch,
        encoder_blocks=layout.encoder_blocks,
        decoder_blocks=layout.decoder_blocks,
        scaling_factor=layout.scaling_factor,
    )
    named = {f"transformer.{name}": value for name, value in tensors.items()}
    merged = [f"LoRA {parts.lora.where} into the transformer"] if parts.lora is not None else []
    tensors = {**named, **weights.finish()}
    return Checkpoint("tinysr-dit", config, tensors, notices=notices, merged=merged, source=source)


def _vae_tensors(file: TensorFile) -> dict[str, Any]:
    tensors = file.only_tensors()
    for prefix in ("module.", "vae."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors
