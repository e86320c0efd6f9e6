"""The list of a folded file's tensors, which its metadata carry: name -> [dtype, shape, checksum], as JSON.

With it a tensor that is missing, has another dtype or shape, or whose values were damaged, is noticed and named; the
fused networks alone cannot tell, for many of their tensors are optional. The checksum is CRC-32 (IEEE 802.3) of the
tensor's bytes as safetensors stores them: it finds damage, and is no signature.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.read.paths import Released, parse_json
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.errors import CheckpointError

ENTRY_BYTES = 1000
"""Most characters for each tensor: an entry is as long as its name and about 50 more."""
REMEDY = "fetch the file again, or convert the checkpoint again"


def manifest(tensors: Mapping[str, Tensor]) -> str:
    """The list of these tensors; those that lie on a GPU are copied to the CPU one by one."""
    return json.dumps({name: _entry(tensor) for name, tensor in tensors.items()}, sort_keys=True, separators=(",", ":"))


def _entry(tensor: Tensor) -> list[Any]:
    return [*_kind(tensor), checksum(tensor)]


def _kind(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def checksum(tensor: Tensor) -> str:
    """CRC-32 of a tensor's elements in row-major order, eight hexadecimal digits; about 2 GB/s on one core."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{zlib.crc32(data.numpy().data):08x}"


def check_manifest(text: str, tensors: Mapping[str, Tensor], where: str) -> None:
    """CheckpointError naming the first tensor that is not as the list says; names, dtypes and shapes come first."""
    if len(text) > ENTRY_BYTES * (len(tensors) + 1):
        raise CheckpointError(f"{where}: metadata tensors: {len(text)} characters for {len(tensors)} tensors; {REMEDY}")
    expected = parse_json(text.encode("utf-8", "surrogatepass"), f"{where}: metadata tensors")
    missing, unknown = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing:
        raise CheckpointError(f"{where}: {listed(missing)}: expected, as the metadata list it, found none; {REMEDY}")
    if unknown:
        raise CheckpointError(f"{where}: {listed(unknown)}: unexpected, the metadata do not list it; {REMEDY}")
    for name, tensor in tensors.items():
        entry = expected[name]
        if not isinstance(entry, list) or entry[:-1] != _kind(tensor):
            raise CheckpointError(
                f"{where}: {quoted(name)}: expected {quoted(entry)}, as the metadata list it, found {_kind(tensor)}; "
                f"{REMEDY}"
            )
    for name, tensor in Released(tensors).items():
        found = checksum(tensor)
        if expected[name][-1] != found:
            raise CheckpointError(
                f"{where}: {quoted(name)}: expected the checksum {quoted(expected[name][-1])}, found {found}: its "
                f"values are damaged; {REMEDY}"
            )
