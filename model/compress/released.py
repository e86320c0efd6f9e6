"""Writing a student: in the layout that TinySR is released in, and folded in the project's own format.

    OUT/tinybackbone/prune-N-merge-tinysr/transformer/config.json, diffusion_pytorch_model*.safetensors
    OUT/vae/separable/config.json, diffusion_pytorch_model.safetensors

Every file appears atomically.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.compress.teacher_files import STEM
from tinysr_kernels.families import TinySRConfig

SHARD = 2**31
"""Maximum bytes of weights per file."""


def write_transformer(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any], shard: int = SHARD
) -> Path:
    """Write the transformer in shards of at most `shard` bytes (or one tensor); returns its folder."""
    place = folder / f"tinybackbone/prune-{config['num_layers']}-merge-tinysr" / "transformer"
    place.mkdir(parents=True, exist_ok=True)
    parts: list[tuple[Path, list[str]]] = []
    waiting: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        nonlocal waiting, size
        if waiting:
            path = place / f"{STEM}-{len(parts) + 1:05d}.part"
            save_file(waiting, path, {"format": "pt"})
            parts.append((path, list(waiting)))
            waiting, size = {}, 0

    for name, tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if size + own > shard:
            flush()
        waiting[name] = tensor.detach().contiguous()
        size += own
        total += own
    flush()
    if len(parts) == 1:
        os.replace(parts[0][0], place / f"{STEM}.safetensors")
    else:
        where: dict[str, str] = {}
        for number, (path, names) in enumerate(parts, start=1):
            file = f"{STEM}-{number:05d}-of-{len(parts):05d}.safetensors"
            os.replace(path, place / file)
            where |= dict.fromkeys(names, file)
        write_json(place / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    write_json(place / "config.json", config)
    return place


def write_vae(folder: Path, state: Mapping[str, Tensor], config: TinySRConfig) -> Path:
    """Write a tiny VAE's weights and the configuration that follows from them; returns its folder."""
    place = folder / "vae" / "separable"
    place.mkdir(parents=True, exist_ok=True)
    beside = place / f"{STEM}.part"
    save_file({name: t.detach().contiguous() for name, t in state.items()}, beside, {"format": "pt"})
    os.replace(beside, place / f"{STEM}.safetensors")
    write_json(place / "config.json", vae_config(state, config))
    return place


def vae_config(state: Mapping[str, Tensor], config: TinySRConfig) -> dict[str, Any]:
    """config.json of an AutoencoderTiny of one width, read from its weights."""
    width = _outputs(state, "encoder.layers.0")
    latent = _outputs(state, f"encoder.layers.{sum(config.encoder_blocks) + len(config.encoder_blocks)}")
    return {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "block_out_channels": [width] * len(config.encoder_blocks),
        "decoder_block_out_channels": [_outputs(state, "decoder.layers.0")] * len(config.decoder_blocks),
        "encoder_block_out_channels": [width] * len(config.encoder_blocks),
        "in_channels": 3,
        "latent_channels": latent,
        "num_decoder_blocks": list(config.decoder_blocks),
        "num_encoder_blocks": list(config.encoder_blocks),
        "out_channels": 3,
        "scaling_factor": config.scaling_factor,
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
    }


def _outputs(state: Mapping[str, Tensor], conv: str) -> int:
    separable = f"{conv}.pointwise.weight"
    return int(state[separable if separable in state else f"{conv}.weight"].shape[0])


def write_json(path: Path, value: object) -> None:
    """Write JSON, atomically, and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def write_folded(folder: Path, path: Path, dtype: torch.dtype = torch.float32) -> None:
    """The student in the project's own format: loaded, folded and saved by `tinysr_kernels.compile`."""
    import tinysr_kernels

    tinysr_kernels.compile(folder, device="cpu", dtype=dtype, backend="reference").save(path)
