"""One file of tensors: safetensors, or a PyTorch pickle opened with weights_only.

Reading takes little memory: both kinds are memory-mapped, so a tensor costs nothing until it is looked at. Nothing in
a file is executed, and a pickle that asks for more than tensors is refused with the way out.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tinysr_kernels.checkpoint.read.header import read_header
from tinysr_kernels.checkpoint.read.paths import read_bytes, regular_file
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


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
    regular_file(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise CheckpointError(f"{path}: expected a file ending in one of {', '.join(SUFFIXES)}")


def _read_safetensors(path: Path) -> TensorFile:
    entries, metadata = read_header(path)
    tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in entries:
                tensors[name] = file.get_tensor(name)
    except Exception as error:  # the library raises its own, OSError, RuntimeError, MemoryError and others
        raise CheckpointError(f"{path}: cannot be read: {_first_line(error)}") from error
    return TensorFile(path, tensors, metadata)


def _read_pickle(path: Path) -> TensorFile:
    size = regular_file(path)
    zipped = read_bytes(path, 0, min(4, size)) == b"PK\x03\x04"
    if zipped:
        _check_zip(path, size)
    try:
        # Mapping is more than thrift: torch then cuts each storage out of the mapped file, so a record shorter than
        # its pickle claims is noticed instead of read past its end.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # it loads, or it is refused below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged pickle can raise anything
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            raise _refusal(path, f"the object {wanted.group(1)}") from error
        raise CheckpointError(f"{path}: damaged, truncated or not a PyTorch file: {_first_line(error)}") from error
    return _tensor_file(path, content, size)


def _check_zip(path: Path, size: int) -> None:
    """torch.save stores its records uncompressed; a compressed one could grow without bound and cannot be mapped."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged or truncated PyTorch archive: {_first_line(error)}") from error
    if any("/code/" in record.filename for record in records):
        raise _refusal(path, "a TorchScript program")
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise CheckpointError(
                f"{path}: record {quoted(record.filename)} is compressed, expected it stored as torch.save does; "
                "save the file again with torch.save or as safetensors"
            )
        if record.header_offset + record.file_size > size:
            raise CheckpointError(
                f"{path}: record {quoted(record.filename)} claims {record.file_size} bytes at "
                f"{record.header_offset} in a file of {size}: truncated or damaged"
            )


def _refusal(path: Path, more: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: refused: besides tensors it holds {more}, and loading that could run code. Nothing was run. If you "
        "trust where the file comes from, rewrite it once as plain tensors, in an environment that has what it needs: "
        f'd = torch.load({path.name!r}, weights_only=False, map_location="cpu"); d = d.get("state_dict", d); '
        'torch.save({k: v for k, v in d.items() if torch.is_tensor(v)}, "weights.pt")'
    )


def _first_line(error: BaseException) -> str:
    text = str(error).replace("\033[1m", "").replace("\033[0m", "")
    text = text.rpartition("WeightsUnpickler error: ")[2].strip()
    return quoted(text.splitlines()[0], 200) if text else type(error).__name__


def _tensor_file(path: Path, content: Any, size: int) -> TensorFile:
    """The tensors of a loaded pickle: a single tensor (named after the file), a state dict, or one in "state_dict"."""
    if isinstance(content, Tensor):
        content = {path.stem: content}
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        return TensorFile(path, {}, {}, {path.stem: type(content).__name__})
    found = TensorFile(path, {})
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            found.tensors[name] = _plain(path, name, value, size)
        else:
            found.others[str(name)[:200]] = type(value).__name__
    return found


def _plain(path: Path, name: str, tensor: Tensor, size: int) -> Tensor:
    """A dense CPU tensor no larger than the file it came from (strides of zero can claim any size)."""
    where = f"{path}: {quoted(name)}"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device}"
        raise CheckpointError(f"{where}: expected a plain dense tensor, found {kind}")
    if tensor.numel() * tensor.element_size() > size:
        raise CheckpointError(
            f"{where}: shape {list(tensor.shape)} of {tensor.dtype} takes more than the file's {size} bytes"
        )
    return tensor.detach()
