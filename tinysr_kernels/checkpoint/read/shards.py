"""Weights split over several files by an index, `*.index.json`: {"weight_map": {tensor: file}, ...}.

The convention is that of diffusers and transformers; that of a variant ends in `.index.<variant>.json`. A shard lies
beside its index; an index never names another.
"""

from __future__ import annotations

import re
from pathlib import Path

from tinysr_kernels.checkpoint.read.header import check_name
from tinysr_kernels.checkpoint.read.paths import read_json, regular_file
from tinysr_kernels.checkpoint.read.tensor_file import SUFFIXES, TensorFile, read_file
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.errors import CheckpointError

VARIANT = "fp16|fp32|bf16|non_ema|ema"
INDEX = re.compile(rf"\.index(\.({VARIANT}))?\.json$")
SHARD_LIMIT = 10_000


def is_index(path: Path) -> bool:
    """Whether a file is named like an index of shards."""
    return INDEX.search(path.name) is not None


def shard_paths(index: Path) -> dict[Path, set[str]]:
    """The shards that an index names and the tensors it places in each; CheckpointError if it is no valid index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: expected an object of file names, found {quoted(weight_map)}")
    shards: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        check_name(index, key)
        _check_shard(index, key, name)
        shards.setdefault(name, set()).add(key)
    if len(shards) > SHARD_LIMIT:
        raise CheckpointError(f"{index}: expected at most {SHARD_LIMIT} files, found {len(shards)}")
    return {index.parent / name: keys for name, keys in shards.items()}


def _check_shard(index: Path, key: str, name: object) -> None:
    where = f"{index}: {quoted(key)}"
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{where}: expected the name of a file, found {quoted(name)}")
    if name in (".", "..") or any(separator in name for separator in "/\\:"):
        raise CheckpointError(f"{where}: expected the name of a file beside the index, found {quoted(name)}")
    if not name.endswith(SUFFIXES):
        raise CheckpointError(f"{where}: expected a file of tensors ({', '.join(SUFFIXES)}), found {quoted(name)}")


def read_index(index: Path) -> TensorFile:
    """All tensors of a sharded checkpoint.

    Raises CheckpointError when a shard is missing or damaged, or when shards and index disagree about a tensor.
    """
    merged = TensorFile(index, {})
    shards = shard_paths(index)
    for path in shards:
        regular_file(path)
    for path, expected in shards.items():
        part = read_file(path)
        found = set(part.only_tensors())
        twice = {name for name in found if name in merged.tensors}
        if twice:
            raise CheckpointError(f"{path}: {listed(twice)} also in another shard of {index.name}")
        if found != expected:
            raise CheckpointError(
                f"{path}: does not hold what {index.name} says: missing {listed(expected - found) or 'none'}, "
                f"unexpected {listed(found - expected) or 'none'}"
            )
        merged.tensors.update(part.tensors)
    return merged


def read_weights(path: Path) -> TensorFile:
    """A file of tensors or an index of shards."""
    return read_index(path) if is_index(path) else read_file(path)
