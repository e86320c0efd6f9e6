"""The header of a safetensors file, checked in full before any memory is taken for its tensors.

Layout (huggingface/safetensors, README): eight bytes with the header's size, little endian; the header, a JSON object
`name -> {dtype, shape, data_offsets}` with an optional `__metadata__` of strings; then the data without gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinysr_kernels.checkpoint.read.paths import JSON_LIMIT, MappedFile, is_shape, parse_json
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError

TENSOR_LIMIT = 10_000  # of a file; the largest networks of this kind have about 2,000
NAME_LIMIT = 1000
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor's entry: its shape, its dtype and its byte range within the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: MappedFile) -> tuple[dict[str, Entry], dict[str, str], int]:
    """The entries and the metadata of a safetensors file, and where its data begin.

    Raises CheckpointError unless sizes, dtypes, shapes and offsets are valid and cover the file exactly.
    """
    path, size = file.path, file.size
    if size < 8:
        raise CheckpointError(f"{path}: expected a safetensors file, found {size} bytes: truncated")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > min(size - 8, JSON_LIMIT):
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, expected at most {min(size - 8, JSON_LIMIT)} "
            f"in a file of {size}: truncated, damaged or not a safetensors file"
        )
    text = file.read(8, length)
    if text.count(b'"dtype"') > TENSOR_LIMIT:  # each entry has it; parsing many more would take seconds
        raise CheckpointError(f"{path}: expected at most {TENSOR_LIMIT} tensors, found more")
    header = parse_json(text, f"{path}: header")
    metadata = _metadata(path, header.pop("__metadata__", {}))
    if len(header) > TENSOR_LIMIT:
        raise CheckpointError(f"{path}: expected at most {TENSOR_LIMIT} tensors, found {len(header)}")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_cover(path, entries, size - 8 - length)
    return entries, metadata, 8 + length


def check_name(path: Path, name: str) -> None:
    """CheckpointError for a tensor's name longer than any module's: looking at names takes time by their length."""
    if len(name) > NAME_LIMIT:
        raise CheckpointError(f"{path}: {quoted(name)}: expected names of at most {NAME_LIMIT} characters")


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{path}: __metadata__: expected an object of strings, found {quoted(value)}")
    return value


def _entry(path: Path, name: str, value: Any) -> Entry:
    check_name(path, name)
    where = f"{path}: {quoted(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {quoted(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: expected one of the dtypes {sorted(DTYPES)}, found {quoted(dtype)}")
    if not is_shape(shape):
        raise CheckpointError(f"{where}: expected a shape of at most 8 sizes and 2^48 elements, found {quoted(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_shape([n]) for n in offsets):
        raise CheckpointError(f"{where}: expected two data_offsets, found {quoted(offsets)}")
    begin, end = offsets
    expected = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} takes {expected} bytes, data_offsets {offsets} give {end - begin}"
        )
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _check_cover(path: Path, entries: dict[str, Entry], data: int) -> None:
    """The tensors lie one after the other and fill the data exactly: no overlap, no gap, nothing missing."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps another tensor" if entry.begin < position else "leaves a gap"
            raise CheckpointError(
                f"{path}: {quoted(name)}: expected data at offset {position}, found {entry.begin}: {kind}"
            )
        position = entry.end
    if position != data:
        raise CheckpointError(
            f"{path}: the header describes {position} bytes of data, found {data}: truncated or damaged"
        )
