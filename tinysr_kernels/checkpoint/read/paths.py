"""Regular files and JSON texts, opened with care: every failure is a CheckpointError that names the file."""

from __future__ import annotations

import json
import math
import mmap
import os
import platform
import stat
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.errors import CheckpointError, OutOfMemory

JSON_LIMIT = 32 * 2**20  # bytes: a text of 200,000 tensors
VALUES_LIMIT = 2_000_000  # commas, in effect: each may cost a hundred bytes once parsed
DEPTH_LIMIT = 32
DIGITS_LIMIT = 40  # of a number; a float64 written by Python has 24 characters at most
_LINUX = sys.platform == "linux"
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if platform.machine() in ("x86_64", "aarch64") else 0)
"""Not every Python names it; the number is that of these processors."""
_MAPS: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()
"""What is mapped, by its address."""
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def regular_file(path: Path) -> int:
    """The size in bytes of a regular, non-empty file.

    Raises CheckpointError for a folder, a device or pipe (reading one may never end), a missing, empty or unreachable
    file.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be opened: {_reason(error)}") from error
    return _regular_size(path, status)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _regular_size(path: Path, status: os.stat_result) -> int:
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path}: expected a file, found a folder")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a regular file, found a device, pipe or socket")
    if status.st_size == 0:
        raise CheckpointError(f"{path}: expected a checkpoint, found an empty file; fetch it again")
    return status.st_size


class MappedFile:
    """A regular file, opened once and mapped: its tensors take memory only when they are looked at.

    The mapping is private, so that writing to a tensor never changes the file. The file must not be made shorter while
    a tensor of it is in use: the operating system then ends the process (as with every reader that maps files).
    """

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError as `regular_file` does, and where the file cannot be read or mapped."""
        regular_file(path)  # before it is opened: opening a device may already do something
        self.path = path
        try:
            descriptor = os.open(path, _FLAGS)
            try:
                self.size = _regular_size(path, os.fstat(descriptor))
                self.data = _mapped(descriptor, self.size)
            finally:
                os.close(descriptor)
        except (OSError, ValueError, MemoryError) as error:
            raise CheckpointError(
                f"{path}: cannot be read: {_reason(error)}; check its permissions, its disk and the free memory"
            ) from error

        _MAPS[torch.frombuffer(self.data, dtype=torch.uint8, count=1).data_ptr()] = self.data

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset`; CheckpointError when the file ends before."""
        if not 0 <= offset <= offset + count <= self.size:
            raise CheckpointError(
                f"{self.path}: expected {count} bytes at {offset}, found {max(0, self.size - offset)}: truncated"
            )
        return self.data[offset : offset + count]

    def flat(self, dtype: torch.dtype, offset: int, numel: int, byte_order: str = "little") -> Tensor:
        """`numel` elements from `offset` as [numel]; they lie within the file, which the caller has checked.

        They may not be aligned to their size, as in safetensors of early 2023; `Released` gives aligned ones. Raises
        OutOfMemory where their bytes have to be swapped and a copy does not fit.
        """
        if numel == 0:
            return torch.empty(0, dtype=dtype, device="cpu")
        raw = torch.frombuffer(self.data, dtype=torch.uint8, count=numel * dtype.itemsize, offset=offset)
        swapped = byte_order != sys.byteorder and dtype.itemsize > 1
        if swapped:  # in place it would be lost with `release`
            try:
                raw = raw.clone()
            except (RuntimeError, MemoryError) as error:  # of torch's allocator
                raise OutOfMemory(
                    f"{self.path}: {len(raw)} bytes of its weights are to be copied and do not fit into memory; free "
                    "some, or save the file again"
                ) from error
        flat = raw.view(dtype)
        if swapped:
            flat.untyped_storage().byteswap(dtype)
        return flat


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """A private mapping. Linux would count all of it as memory to come, and refuse a file larger than the memory."""
    if _LINUX:
        flags = mmap.MAP_PRIVATE | _NORESERVE
        return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)


def release(tensor: Tensor) -> None:
    """Give back the memory of a mapped file's tensor that was looked at; whoever looks again has the file read again.

    Whatever else shares its storage too. Nothing happens to tensors that lie elsewhere, and on other systems than
    Linux, which give such memory back when they need it.
    """
    if not _LINUX or tensor.device.type != "cpu":
        return
    try:
        storage = tensor.untyped_storage()
        begin, size = storage.data_ptr(), storage.nbytes()
    except (RuntimeError, NotImplementedError):  # an odd tensor of the caller's, without an address: no file's
        return
    for address, data in list(_MAPS.items()):
        if address <= begin and begin + size <= address + len(data):
            first = -(-(begin - address) // mmap.PAGESIZE) * mmap.PAGESIZE
            last = (begin + size - address) // mmap.PAGESIZE * mmap.PAGESIZE
            if last > first:
                data.madvise(mmap.MADV_DONTNEED, first, last - first)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its elements lie at addresses that are no multiples of their size."""
    try:
        misaligned = tensor.device.type == "cpu" and tensor.data_ptr() % tensor.dtype.itemsize > 0
    except (RuntimeError, NotImplementedError):  # see `release`
        return tensor
    return tensor.clone() if misaligned else tensor


class Released(Mapping[str, Tensor]):
    """Tensors of mapped files, looked at one after the other: aligned, and the one before is given back (`release`)."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._last: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        last, self._last = self._last, tensor
        if last is not None and last is not tensor:
            release(last)
        return aligned(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def is_shape(value: Any) -> bool:
    """Whether a value from a file is a list or tuple of at most 8 sizes whose product (zeros apart) is below 2^48."""
    return (
        isinstance(value, (list, tuple))
        and len(value) <= 8
        and all(type(n) is int and 0 <= n < 2**48 for n in value)
        and math.prod(max(n, 1) for n in value) < 2**48
    )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {quoted(twice)} occurs twice")
    return values


def _integer(text: str) -> int:
    if len(text) > DIGITS_LIMIT:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _check_values(value: Any) -> None:
    """ValueError for too deep a nesting, and for text that no file can hold (half of a surrogate pair)."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        for one in level:
            if isinstance(one, str):
                one.encode()
        level = [child for one in level for child in _children(one)]
        if not level:
            return
    raise ValueError(f"more than {DEPTH_LIMIT} levels")


def _children(value: Any) -> Iterable[Any]:
    return (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ()


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, of bounded depth and number of values; numbers may be NaN or infinite.

    Raises CheckpointError for anything else.
    """
    if data.count(b",") > VALUES_LIMIT:
        raise CheckpointError(f"{where}: expected at most {VALUES_LIMIT} values, found more; is it the right file?")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_int=_integer,
        )
        _check_values(value)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: expected valid JSON, found: {quoted(str(error))}; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 32 MiB; CheckpointError otherwise."""
    size = regular_file(path)
    if size > JSON_LIMIT:
        raise CheckpointError(f"{path}: expected at most {JSON_LIMIT} bytes of JSON, found {size}")
    file = MappedFile(path)
    return parse_json(file.read(0, min(file.size, JSON_LIMIT)), str(path))
