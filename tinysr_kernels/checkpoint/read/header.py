"""The header of a safetensors file, checked in full before any memory is taken for its tensors.

Layout (huggingface/safetensors, README): eight bytes with the header's size, little endian; the header, a JSON object
`name -> {dtype, shape, data_offsets}` with an optional `__metadata__` of strings; then the data without gaps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinysr_kernels.checkpoint.read.paths import parse_json, read_bytes, regular_file
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # the limit of the safetensors library itself
TENSOR_LIMIT = 200_000
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor's entry: its shape, its dtype as the file names it and its byte range within the data."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entries and the metadata of a safetensors file.

    Raises CheckpointError unless sizes, dtypes, shapes and offsets are valid and cover the file exactly.
    """
    size = regular_file(path)
    if size < 8:
        raise CheckpointError(f"{path}: expected a safetensors file, found {size} bytes: truncated")
    length = int.from_bytes(read_bytes(path, 0, 8), "little")
    if length > min(size - 8, HEADER_LIMIT):
        raise CheckpointError(
            f"{path}: the header claims {length} bytes, expected at most {min(size - 8, HEADER_LIMIT)} "
            f"in a file of {size}: truncated, damaged or not a safetensors file"
        )
    header = parse_json(read_bytes(path, 8, length), f"{path}: header")
    metadata = _metadata(path, header.pop("__metadata__", {}))
    if len(header) > TENSOR_LIMIT:
        raise CheckpointError(f"{path}: expected at most {TENSOR_LIMIT} tensors, found {len(header)}")
    entries = {name: _entry(path, name, value) for name, value in header.items()}
    _check_cover(path, entries, size - 8 - length)
    return entries, metadata


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise CheckpointError(f"{path}: __metadata__: expected an object of strings, found {quoted(value)}")
    return value


def _size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _entry(path: Path, name: str, value: Any) -> Entry:
    where = f"{path}: {quoted(name)}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets, found {quoted(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where}: expected one of the dtypes {sorted(ITEM_BYTES)}, found {quoted(dtype)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(_size(n) for n in shape):
        raise CheckpointError(f"{where}: expected a shape of at most 8 sizes, found {quoted(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_size(n) for n in offsets):
        raise CheckpointError(f"{where}: expected two data_offsets, found {quoted(offsets)}")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: shape {shape} of {dtype} takes {expected} bytes, data_offsets {offsets} give {end - begin}"
        )
    return Entry(dtype, tuple(shape), begin, end)


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
