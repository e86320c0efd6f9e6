"""A teacher in diffusers' layout, read lazily, one tensor at a time, to bound memory.

    TEACHER/transformer/config.json                                    _class_name SD3Transformer2DModel
    TEACHER/transformer/diffusion_pytorch_model*.safetensors           one file, or shards with an index
    TEACHER/vae/config.json, vae/diffusion_pytorch_model.safetensors   AutoencoderKL
    LORA/transformer.safetensors, LORA/vae.safetensors                 as TSD-SR releases them; either may be missing

Everything that does not fit is a ValueError that names the file and the key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.reference.sd3_transformer import SD3Config

STEM = "diffusion_pytorch_model"
HALVES = ("A", "B")
PREFIX = "transformer."


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor of a safetensors file or of shards; each access reads that tensor from disk."""

    def __init__(self, paths: list[Path]) -> None:
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        self.paths = paths
        for path in paths:
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path}: cannot be read as safetensors: {error}") from error
            for name in file.keys():  # noqa: SIM118 - no mapping
                if name in self._where:
                    raise ValueError(f"{path}: {name} is in another shard too")
                self._where[name] = file

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, without reading it; KeyError if there is none."""
        return tuple(self._where[name].get_slice(name).get_shape())

    def close(self) -> None:
        self._stack.close()


def weights_in(folder: Path) -> LazyTensors:
    """The weights of one diffusers model: its file, or all shards that its index names."""
    index = folder / f"{STEM}.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = [folder / name for name in sorted(set(names.values()))]
        for path in paths:
            if not path.exists():
                raise ValueError(f"{index} names {path.name}, which is missing")
        tensors = LazyTensors(paths)
        missing = sorted(set(names) - set(tensors))
        if missing:
            raise ValueError(f"{folder}: the index names {missing[0]}, which no shard holds")
        return tensors
    single = folder / f"{STEM}.safetensors"
    if not single.exists():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise ValueError(f"{folder}: expected {single.name} or {index.name}, found {[p.name for p in found]}")
        single = found[0]
    return LazyTensors([single])


def part(folder: Path, name: str, class_name: str) -> tuple[Path, dict[str, Any]]:
    """(folder, config.json) of a teacher's part; `folder` is the teacher's or the part's own.

    Raises ValueError if there is no such part, or it is of another class.
    """
    candidates = [path for path in (folder / name, folder) if (path / "config.json").exists()]
    if not candidates:
        raise ValueError(f"{folder}: no {name}/config.json")
    config = json.loads((candidates[0] / "config.json").read_text(encoding="utf-8"))
    found = config.get("_class_name")
    if found != class_name:
        raise ValueError(f"{candidates[0] / 'config.json'}: expected a {class_name}, found {found}")
    return candidates[0], config


def transformer_config(values: Mapping[str, Any], where: str) -> SD3Config:
    """config.json as SD3Config; ValueError for variants with blocks that the student does not support."""
    if values.get("dual_attention_layers") or values.get("qk_norm"):
        raise ValueError(f"{where}: dual attention and normalized queries (SD 3.5) have no place in TinySR's blocks")
    missing = [f.name for f in fields(SD3Config) if not isinstance(values.get(f.name), int)]
    if missing:
        raise ValueError(f"{where}: {missing[0]}: expected an integer, found {values.get(missing[0])!r}")
    config = SD3Config(**{f.name: values[f.name] for f in fields(SD3Config)})
    if config.caption_projection_dim != config.dim:
        raise ValueError(
            f"{where}: caption_projection_dim: expected {config.dim}, the width, found {config.caption_projection_dim}"
        )
    return config


# ---------------------------------------------------------------------------------------------------------------- LoRA
class LoRA:
    """Pairs `transformer.<module>.lora_A.weight`, `.lora_B.weight`, checked against the weights that they adapt.

    The prefix stands in TSD-SR's files of either part, the VAE's too; it may be missing.
    """

    def __init__(self, tensors: Mapping[str, Tensor], where: str, scale: float = 1.0) -> None:
        self.scale, self.where = scale, where
        self.pairs: dict[str, dict[str, Tensor]] = {}
        for key in tensors:
            module, _, rest = key.removeprefix(PREFIX).rpartition(".lora_")
            half = rest.removesuffix(".weight").removesuffix(".default")
            if not module or half not in HALVES:
                raise ValueError(f"{where}: {key}: expected <module>.lora_A.weight or .lora_B.weight")
            self.pairs.setdefault(module, {})[half] = tensors[key]
        for module, pair in self.pairs.items():
            if len(pair) != len(HALVES):
                raise ValueError(f"{where}: {module}: has lora_{next(iter(pair))} without its other half")

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every pair matches a weight; ValueError names the first that does not."""
        for module, pair in self.pairs.items():
            shape = shapes.get(f"{module}.weight")
            if shape is None:
                raise ValueError(f"{self.where}: {module}: the teacher has no such module")
            down, up = pair["A"].flatten(1), pair["B"].flatten(1)
            fits = down.shape[0] == up.shape[1] and (up.shape[0], down.shape[1]) == (shape[0], _inputs(shape))
            if not fits:
                raise ValueError(
                    f"{self.where}: {module}: lora_A {list(pair['A'].shape)} and lora_B {list(pair['B'].shape)} "
                    f"do not make a weight {list(shape)}"
                )

    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with its LoRA pair, if any, merged in float32 or wider."""
        pair = self.pairs.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if pair is None:
            return tensor
        wide = torch.promote_types(tensor.dtype, torch.float32)
        change = pair["B"].to(wide).flatten(1) @ pair["A"].to(wide).flatten(1)
        return (tensor.to(wide) + self.scale * change.reshape(tensor.shape)).to(tensor.dtype)


def _inputs(shape: tuple[int, ...]) -> int:
    size = 1
    for side in shape[1:]:
        size *= side
    return size


def lora_in(place: Path | None, name: str, scale: float = 1.0) -> LoRA:
    """The LoRA `name`.safetensors of a folder, or a file that is itself the transformer's; empty if there is none."""
    if place is None:
        return LoRA({}, "no LoRA")
    path = place / f"{name}.safetensors" if place.is_dir() else place
    if not path.exists() or (place.is_file() and name != "transformer"):
        if name == "transformer":
            raise ValueError(f"{path}: no such LoRA")
        return LoRA({}, "no LoRA")
    return LoRA(LazyTensors([path]), str(path), scale)
