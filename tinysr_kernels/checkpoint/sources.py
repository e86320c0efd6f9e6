"""The values that name a part of a checkpoint: a path, a module, a state dict; and embeddings in every form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tinysr_kernels.checkpoint.detect import EMBEDDINGS, OTHER, Folder, Roles, config_for, narrow, scan
from tinysr_kernels.checkpoint.embeddings import Candidate
from tinysr_kernels.checkpoint.read.paths import read_json
from tinysr_kernels.checkpoint.read.shards import read_weights
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError


@dataclass
class FoundPart:
    """One part of a checkpoint as found, with the configuration that came with it."""

    file: TensorFile
    config: dict[str, Any] | None = None
    config_where: str = ""
    own: Any = None
    """A module's `config` where it is no mapping, or the configuration in an own file's metadata."""


def is_path(value: object) -> bool:
    """Whether a value names a file or folder."""
    return isinstance(value, (str, os.PathLike))


def as_path(value: Any) -> Path:
    """The path with `~` expanded; CheckpointError for bytes and other oddities."""
    try:
        return Path(value).expanduser()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"expected a path, found {quoted(value)}: {error}") from error


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False for what cannot be reached, which reading then reports."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def module_file(module: nn.Module, label: str) -> TensorFile:
    """A snapshot of a module's state dict on the CPU: copies, so that training on changes nothing."""
    file = TensorFile(Path(label), {})
    for name, value in module.state_dict().items():
        if not isinstance(value, Tensor):
            file.others[name] = type(value).__name__
            continue
        if value.is_meta or value.is_sparse or value.is_quantized:
            raise CheckpointError(
                f"{label}: {quoted(name)}: expected a plain dense tensor, found {value.layout} on {value.device}"
            )
        file.tensors[name] = value.detach().to("cpu", copy=True)
    return file


def module_part(module: nn.Module, label: str) -> FoundPart:
    """A module's tensors and configuration: a family's own, or a mapping as diffusers' modules have."""
    values, own = module_config(module)
    return FoundPart(module_file(module, label), values, f"{label}.config", own)


def module_config(module: nn.Module) -> tuple[dict[str, Any] | None, Any]:
    """A module's `config`: (its values, None) where it is a mapping, else (None, itself), which may be None."""
    config = getattr(module, "config", None)
    return (dict(config), None) if isinstance(config, Mapping) else (None, config)


def find_part(value: Any, role: str, name: str, roles: Roles, class_name: str | None = None) -> FoundPart:
    """One part from a path (file, index or folder), a module or a mapping of tensors.

    name: what the caller called it, for messages. class_name: asks for the configuration of that class too: beside the
    file, in the folder, or of the module.
    """
    if isinstance(value, nn.Module):
        return module_part(value, f"module {name!r}")
    if isinstance(value, Mapping):
        return FoundPart(mapping_file(value, f"dict {name!r}"))
    if not is_path(value):
        raise CheckpointError(f"{name}: expected a path, a module or a dict of tensors, found {type(value).__name__}")
    path = as_path(value)
    if is_folder(path):
        folder = scan(path, roles)
        if class_name:
            narrow(folder, role, class_name)
        return folder_part(folder, role, class_name)
    file = read_weights(path)
    found = roles.of(file)
    if found not in (role, OTHER):
        raise CheckpointError(f"{path}: expected {roles.description(role)}, found {roles.description(found)}")
    if class_name is None:
        return FoundPart(file)
    beside = Folder(path.parent, roles)
    config = path.parent / "config.json"
    if os.path.lexists(config):
        values = read_json(config)
        if isinstance(values.get("_class_name"), str):
            beside.configs = [(config, values)]
    return FoundPart(file, *config_for(beside, file, class_name))


def folder_part(folder: Folder, role: str, class_name: str | None) -> FoundPart:
    """The only file of a role in a scanned folder, with its configuration."""
    file = folder.one(role)
    return FoundPart(file, *config_for(folder, file, class_name)) if class_name else FoundPart(file)


def mapping_file(tensors: Mapping[Any, Any], label: str) -> TensorFile:
    """A state dict as if it were a file; CheckpointError if it holds anything but tensors."""
    file = TensorFile(Path(label), {})
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{label}: {quoted(name)}: expected a tensor, found {type(value).__name__}")
        file.tensors[name] = value.detach().cpu()
    return file


def embedding_files(value: Any, roles: Roles) -> list[TensorFile]:
    """The files of tensors that an `embeddings` value stands for.

    A tensor; a path to a file or folder; a mapping from names to tensors or paths; or a sequence of these.
    """
    if value is None:
        return []
    if isinstance(value, Tensor):
        return [TensorFile(Path("embeddings"), {"embeddings": value.detach().cpu()})]
    if isinstance(value, Mapping):
        files = []
        for name, item in value.items():
            if isinstance(item, Tensor):
                files.append(mapping_file({name: item}, "embeddings"))
            else:
                files += [_renamed(file, str(name)) for file in embedding_files(item, roles)]
        return files
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [file for item in value for file in embedding_files(item, roles)]
    if not is_path(value):
        raise CheckpointError(f"embeddings: expected a tensor, a path or a dict, found {type(value).__name__}")
    path = as_path(value)
    if is_folder(path):
        folder = scan(path, roles)
        if not folder.of(EMBEDDINGS):
            folder.one(EMBEDDINGS)
        return folder.of(EMBEDDINGS)
    file = read_weights(path)
    file.only_tensors()
    return [file]


def _renamed(file: TensorFile, name: str) -> TensorFile:
    """A file of one tensor, under the name that the caller gave it."""
    if len(file.tensors) == 1:
        file.tensors = {name: next(iter(file.tensors.values()))}
    return file


def candidates(files: Sequence[TensorFile]) -> list[Candidate]:
    """Every tensor of these files as a candidate embedding."""
    return [
        Candidate(
            name if len(file.tensors) > 1 else f"{file.path.stem} {name}", tensor, f"{file.where}: {quoted(name)}"
        )
        for file in files
        for name, tensor in file.tensors.items()
    ]
