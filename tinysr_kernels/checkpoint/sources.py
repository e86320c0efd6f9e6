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
from tinysr_kernels.checkpoint.plain import (
    is_a,
    kind_of,
    module_config,
    module_state,
    plain_list,
    plain_mapping,
    plain_tensor,
)
from tinysr_kernels.checkpoint.read.paths import read_json
from tinysr_kernels.checkpoint.read.shards import read_weights
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError, shorten

NESTING = 2
"""Levels of lists and dicts in `embeddings`, which may contain itself."""


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
    return is_a(value, str) or is_a(value, os.PathLike)


def is_called(embeddings: Any) -> bool:
    """Whether `embeddings` are no constants: something that is called with each image."""
    constant = is_path(embeddings) or any(is_a(embeddings, kind) for kind in (Tensor, Mapping, list, tuple))
    return callable(embeddings) and not constant


def as_path(value: Any) -> Path:
    """The path with `~` expanded; CheckpointError for bytes and other oddities."""
    try:
        return Path(value).expanduser()
    except Exception as error:  # an object's own __fspath__ may raise anything
        raise CheckpointError(f"expected a path, found {kind_of(value)}: {shorten(error)}") from error


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False for what cannot be reached, which reading then reports."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def module_file(module: nn.Module, label: str) -> TensorFile:
    """A module's state dict, still in the module's own memory where that is the CPU's; see `snapshot`."""
    file = TensorFile(Path(label), {})
    for name, value in module_state(module, label).items():
        if is_a(value, Tensor):
            file.tensors[name] = plain_tensor(value, f"{label}: {quoted(name)}")
        else:
            file.others[name] = kind_of(value)
    return file


def snapshot(file: TensorFile) -> None:
    """Copy the tensors, so that a module which is trained on changes nothing."""
    file.tensors = {name: tensor.clone() for name, tensor in file.tensors.items()}


def module_part(module: nn.Module, label: str) -> FoundPart:
    """A module's tensors and configuration: a family's own, or a mapping as diffusers' modules have."""
    values, own = module_config(module, label)
    return FoundPart(module_file(module, label), values, f"{label}.config", own)


def find_part(value: Any, role: str, name: str, roles: Roles, class_name: str | None = None) -> FoundPart:
    """One part from a path (file, index or folder), a module or a mapping of tensors.

    name: what the caller called it, for messages. class_name: asks for the configuration of that class too: beside the
    file, in the folder, or of the module.
    """
    if is_a(value, nn.Module):
        part = module_part(value, f"module {name!r}")
        snapshot(part.file)
        return part
    if is_a(value, Mapping):
        return FoundPart(mapping_file(value, f"dict {name!r}"))
    if not is_path(value):
        raise CheckpointError(f"{name}: expected a path, a module or a dict of tensors, found {kind_of(value)}")
    path = as_path(value)
    if is_folder(path):
        folder = scan(path, roles)
        if class_name:
            narrow(folder, role, class_name)
        return folder_part(folder, role, class_name)
    file = read_weights(path)
    found = roles.of(file)
    if found not in (role, OTHER) and not roles.may_be(file, role):
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
    """A state dict as if it were a file; CheckpointError if it holds anything but plain dense tensors."""
    items = plain_mapping(tensors, label).items()
    return TensorFile(Path(label), {name: plain_tensor(value, f"{label}: {quoted(name)}") for name, value in items})


def embedding_files(value: Any, roles: Roles, levels: int = NESTING) -> list[TensorFile]:
    """The files of tensors that an `embeddings` value stands for.

    A tensor; a path to a file or folder; a mapping from names to tensors or paths; or a list or tuple of these, nested
    at most `levels` times.
    """
    if value is None:
        return []
    if is_a(value, Tensor):
        return [TensorFile(Path("embeddings"), {"embeddings": plain_tensor(value, "embeddings")})]
    listed = is_a(value, list) or is_a(value, tuple)
    if (listed or is_a(value, Mapping)) and not levels:
        raise CheckpointError(f"embeddings: expected at most {NESTING} levels of lists and dicts, found more")
    if is_a(value, Mapping):
        files = []
        for name, item in plain_mapping(value, "embeddings").items():
            if is_a(item, Tensor):
                files.append(mapping_file({name: item}, "embeddings"))
            else:
                files += [_renamed(file, name) for file in embedding_files(item, roles, levels - 1)]
        return files
    if listed:
        return [file for item in plain_list(value, "embeddings") for file in embedding_files(item, roles, levels - 1)]
    if not is_path(value):
        raise CheckpointError(f"embeddings: expected a tensor, a path or a dict, found {kind_of(value)}")
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
