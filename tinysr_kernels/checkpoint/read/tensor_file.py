"""One file of tensors: safetensors, or what torch.save wrote.

Reading takes little memory: both kinds are mapped, so that a tensor costs nothing until it is looked at. Nothing in a
file is executed, and a pickle that asks for more than tensors is refused with the way out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tinysr_kernels.checkpoint.read.header import check_name, read_header
from tinysr_kernels.checkpoint.read.paths import MappedFile, regular_file
from tinysr_kernels.checkpoint.read.stored import Inert, StoredTensor, kind_of
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.read.torch_file import TorchFile
from tinysr_kernels.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
SEVERAL = "state_dict_"
"""What the names of several state dicts in one file begin with."""
MAX_SHARING = 8
"""How many times a file's size its tensors may take: a weight may have two or three names, or a stride of zero."""


@dataclass
class TensorFile:
    """The tensors of a file (or of the shards of an index, or of a module) under their stored names."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    """What lies between the tensors and is none: stored name -> name of its type."""

    @property
    def where(self) -> str:
        return str(self.path)

    def only_tensors(self) -> dict[str, Tensor]:
        """The tensors of a state dict that must hold nothing else; CheckpointError naming what else it holds."""
        for name, kind in self.others.items():
            raise CheckpointError(f"{self.where}: {quoted(name)}: expected a tensor, found {kind}")
        if not self.tensors:
            raise CheckpointError(f"{self.where}: expected tensors, found none")
        return self.tensors


def read_file(path: Path) -> TensorFile:
    """Read one file by its suffix; CheckpointError for a damaged, refused or unknown one."""
    if path.suffix == ".safetensors":
        return _read_safetensors(MappedFile(path))
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(MappedFile(path))
    regular_file(path)
    raise CheckpointError(f"{path}: expected a file ending in one of {', '.join(SUFFIXES)}")


def _read_safetensors(file: MappedFile) -> TensorFile:
    entries, metadata, data = read_header(file)
    tensors = {
        name: file.flat(entry.dtype, data + entry.begin, math.prod(entry.shape)).view(entry.shape)
        for name, entry in entries.items()
    }
    return TensorFile(file.path, tensors, metadata)


def _read_pickle(file: MappedFile) -> TensorFile:
    """A single tensor (named after the file), a state dict, one in "state_dict", or several in "state_dict_<name>".

    The tensors of the last are named "state_dict_<name>.<own name>".
    """
    stored = TorchFile(file)
    content = stored.content
    if isinstance(content, StoredTensor):
        content = {file.path.stem: content}
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        return TensorFile(file.path, {}, {}, {file.path.stem: kind_of(content)})
    found = TensorFile(file.path, {})
    claimed = 0
    for name, value in _items(content):
        if not isinstance(value, StoredTensor) or not isinstance(name, str):
            if isinstance(value, Inert) and value.is_tensor:
                raise CheckpointError(f"{file.path}: {quoted(name)}: expected a plain dense tensor, found {value.kind}")
            found.others[str(name)[:200]] = kind_of(value)
            continue
        check_name(file.path, name)
        claimed += math.prod(value.shape) * value.dtype.itemsize
        if claimed > MAX_SHARING * file.size:
            raise CheckpointError(
                f"{file.path}: {quoted(name)}: shape {list(value.shape)} of {value.dtype}, with the tensors before it, "
                f"takes more than {MAX_SHARING} times the file's {file.size} bytes; save copies of its tensors instead"
            )
        found.tensors[name] = stored.tensor(value)
    return found


def _items(content: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """The entries of a state dict, those of one "state_dict_<name>" among them under longer names."""
    for name, value in content.items():
        if isinstance(value, dict) and isinstance(name, str) and name.startswith(SEVERAL):
            yield from ((f"{name}.{own}", one) for own, one in value.items())
        else:
            yield name, value
