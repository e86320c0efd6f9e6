"""The metadata of this project's own safetensors files, and writing them whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tinysr_kernels.checkpoint.read.paths import parse_json
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError

FORMAT = "tinysr_kernels"
VERSION = 1


@dataclass(frozen=True)
class OwnMetadata:
    """What the metadata of a file of ours says: a family's name and the values of its configuration, both unchecked.

    folded_dtype: the torch name of the dtype it was folded for, such as "float16"; None unless the file is folded.
    """

    family: str
    config: dict[str, Any]
    folded: bool
    folded_dtype: str | None


def own_metadata(family: str, config: Any) -> dict[str, str]:
    """The metadata of an unfolded file in our own layout; `config` is the family's, a dataclass of plain values."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "family": family,
        "config": json.dumps(asdict(config), sort_keys=True),
    }


def folded_metadata(family: str, config: Any, dtype: str, quantize: str | None = None) -> dict[str, str]:
    """The metadata of a folded file; `dtype` is the torch name of what it was folded for, such as "float16".

    quantize: "fp8" for a file with e4m3 weights and their scales, which the tensors' own dtypes say too.
    """
    extra = {} if quantize is None else {"quantize": quantize}
    return {**own_metadata(family, config), "folded": "1", "dtype": dtype, **extra}


def is_own(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata says that it is ours and describes a network."""
    return metadata.get("format") == FORMAT and "family" in metadata


def read_metadata(metadata: Mapping[str, str], where: str) -> OwnMetadata:
    """Read back what `own_metadata` and `folded_metadata` wrote; the family's name and its values are not judged.

    Raises CheckpointError for another format, a version from the future, an unknown dtype, a configuration that is no
    JSON object.
    """
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{where}: metadata format: expected {FORMAT!r}, found {quoted(metadata.get('format'))}")
    version = metadata.get("version", "")
    if not (version.isascii() and version.isdigit() and len(version) < 9):
        raise CheckpointError(f"{where}: metadata version: expected a number, found {quoted(version)}")
    if int(version) != VERSION:
        remedy = "; install a newer tinysr-kernels" if int(version) > VERSION else ""
        raise CheckpointError(f"{where}: metadata version: expected {VERSION}, found {int(version)}{remedy}")
    if "family" not in metadata:
        raise CheckpointError(f"{where}: metadata family: expected the name of a family, found None")
    if "config" not in metadata:
        raise CheckpointError(f"{where}: metadata config: expected the network's configuration, found none")
    values = parse_json(metadata["config"].encode(), f"{where}: metadata config")
    folded, dtype = metadata.get("folded"), metadata.get("dtype")
    if folded not in (None, "0", "1"):
        raise CheckpointError(f"{where}: metadata folded: expected '1', found {quoted(folded)}")
    if folded == "1" and not isinstance(getattr(torch, dtype or "", None), torch.dtype):
        raise CheckpointError(f"{where}: metadata dtype: expected a torch dtype's name, found {quoted(dtype)}")
    return OwnMetadata(metadata["family"], values, folded == "1", dtype if folded == "1" else None)


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all: written beside, synchronized, then renamed.

    Tensors may have any strides, lie on any device and share memory. Raises OSError when writing fails.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name[:100]}.{secrets.token_hex(8)}.tmp")
    try:
        beside.touch()  # learns the mode that a new file gets here; the library would leave it to its owner alone
        mode = beside.stat().st_mode
        save_file(_separate(tensors), beside, dict(metadata))
        beside.chmod(mode)
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    except SafetensorError as error:
        raise OSError(f"{target}: cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors with a storage each: the format cannot express shared memory."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if storage in seen and plain.numel() else plain
        seen.add(storage)
    return separate
