"""The metadata of this project's own safetensors files, and writing them whole or not at all."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tinysr_kernels.checkpoint.read.paths import parse_json
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.read.weights import check_finite
from tinysr_kernels.checkpoint.result import Checkpoint
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import FAMILIES, Config, Family, config_from_dict, config_to_dict

FORMAT = "tinysr_kernels"
VERSION = 1


@dataclass(frozen=True)
class OwnMetadata:
    """What the metadata of a file of ours says; `folded_dtype` is None unless the file is folded."""

    family: Family
    config: Config
    folded: bool
    folded_dtype: str | None


def own_metadata(family: Family, config: Config) -> dict[str, str]:
    """The metadata of an unfolded file in our own layout."""
    return {
        "format": FORMAT,
        "version": str(VERSION),
        "family": family,
        "config": json.dumps(config_to_dict(config), sort_keys=True),
    }


def folded_metadata(family: Family, config: Config, dtype: str, quantize: str | None = None) -> dict[str, str]:
    """The metadata of a folded file; `dtype` is the torch name of what it was folded for, such as "float16".

    quantize: "fp8" for a file with e4m3 weights and their scales, which the tensors' own dtypes say too.
    """
    extra = {} if quantize is None else {"quantize": quantize}
    return {**own_metadata(family, config), "folded": "1", "dtype": dtype, **extra}


def is_own(metadata: Mapping[str, str]) -> bool:
    """Whether a file's metadata says that it is ours and describes a network."""
    return metadata.get("format") == FORMAT and "family" in metadata


def read_metadata(metadata: Mapping[str, str], where: str) -> OwnMetadata:
    """Read back what `own_metadata` and `folded_metadata` wrote.

    Raises CheckpointError for a version from the future, an unknown family, dtype or configuration.
    """
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{where}: metadata format: expected {FORMAT!r}, found {quoted(metadata.get('format'))}")
    version = metadata.get("version", "")
    if not (version.isascii() and version.isdigit() and len(version) < 9):
        raise CheckpointError(f"{where}: metadata version: expected a number, found {quoted(version)}")
    if int(version) != VERSION:
        remedy = "; install a newer tinysr-kernels" if int(version) > VERSION else ""
        raise CheckpointError(f"{where}: metadata version: expected {VERSION}, found {int(version)}{remedy}")
    family = next((known for known in FAMILIES if known == metadata.get("family")), None)
    if family is None:
        raise CheckpointError(
            f"{where}: metadata family: expected one of {FAMILIES}, found {quoted(metadata.get('family'))}"
        )
    if "config" not in metadata:
        raise CheckpointError(f"{where}: metadata config: expected the network's configuration, found none")
    values = parse_json(metadata["config"].encode(), f"{where}: metadata config")
    try:
        config = config_from_dict(family, values)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: metadata config: {error}") from error
    folded, dtype = metadata.get("folded"), metadata.get("dtype")
    if folded not in (None, "0", "1"):
        raise CheckpointError(f"{where}: metadata folded: expected '1', found {quoted(folded)}")
    if folded == "1" and not isinstance(getattr(torch, dtype or "", None), torch.dtype):
        raise CheckpointError(f"{where}: metadata dtype: expected a torch dtype's name, found {quoted(dtype)}")
    return OwnMetadata(family, config, folded == "1", dtype if folded == "1" else None)


def load_folded(file: TensorFile) -> Checkpoint:
    """A folded file as it is: metadata and finiteness checked, the tensors' meaning left to nets/."""
    own = read_metadata(file.metadata, file.where)
    for name, tensor in file.only_tensors().items():
        check_finite(tensor, f"{file.where}: {quoted(name)}")
    return Checkpoint(
        own.family,
        own.config,
        file.tensors,
        folded=True,
        folded_dtype=own.folded_dtype,
        source=file.where,
        metadata=dict(file.metadata),
    )


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file that appears whole or not at all: written beside, synchronised, then renamed.

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
