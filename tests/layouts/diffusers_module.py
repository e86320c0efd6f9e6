"""A module as diffusers writes it: config.json, and the weights in one of the forms that occur."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tests.layouts.weights import write_pickle, write_safetensors

STEM = "diffusion_pytorch_model"
Files = Literal["safetensors", "sharded", "bin", "sharded bin", "snapshot"]


def write_module(
    folder: Path, config: dict[str, Any], state: dict[str, Tensor], files: Files, dtype: torch.dtype
) -> None:
    """Write it; "snapshot": in four copies, of which all but the first hold other weights."""
    write_json(folder / "config.json", config)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    if files == "bin":
        write_pickle(folder / f"{STEM}.bin", state)
    elif files.startswith("sharded"):
        _write_shards(folder, state, ".bin" if files.endswith("bin") else ".safetensors")
    else:
        write_safetensors(folder / f"{STEM}.safetensors", state)
    if files == "snapshot":
        other = {name: tensor.half() + 1 for name, tensor in state.items()}
        write_safetensors(folder / f"{STEM}.fp16.safetensors", other)
        write_pickle(folder / f"{STEM}.bin", other)
        write_pickle(folder / f"{STEM}.fp16.bin", other)


def _write_shards(folder: Path, state: dict[str, Tensor], suffix: str) -> None:
    """Two files and their index."""
    write = write_safetensors if suffix == ".safetensors" else write_pickle
    names = list(state)
    places = {}
    for number, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"{STEM}-0000{number}-of-00002{suffix}"
        write(folder / file, {name: state[name] for name in half})
        places |= dict.fromkeys(half, file)
    write_json(folder / f"{STEM}{suffix}.index.json", {"metadata": {}, "weight_map": places})


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Values as JSON, creating the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
