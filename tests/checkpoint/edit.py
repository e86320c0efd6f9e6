"""Checkpoints as a test wants them: tensors of a written file changed, files of raw bytes, pickles with code."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.layouts.weights import write_pickle, write_safetensors
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import load


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def edit(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Apply `change` to the tensors of a safetensors file or a pickled state dict, in place."""
    if path.suffix == ".safetensors":
        tensors, metadata = read(path)
        change(tensors)
        write_safetensors(path, tensors, metadata)
    else:
        content = torch.load(path, weights_only=True)
        change(content.get("state_dict", content))
        write_pickle(path, content)
    return path


def edit_json(path: Path, **values: Any) -> Path:
    """Set fields of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    content |= values
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return path


def edit_metadata(path: Path, **values: str | None) -> Path:
    """Set entries of a safetensors file's metadata; None removes one."""
    tensors, metadata = read(path)
    changed = {**metadata, **values}
    write_safetensors(path, tensors, {k: v for k, v in changed.items() if v is not None})
    return path


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header (bytes, or a value written as JSON) and any claimed header length."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def refused(ckpt: Any, *words: str, embeddings: Any = None) -> str:
    """Load, expect a CheckpointError that holds all `words`, and return its message."""
    with pytest.raises(CheckpointError) as caught:
        load(ckpt, embeddings=embeddings)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    return message


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, shapes and, bit for bit in the expected dtype, values: stored ones may be narrower or wider."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name
