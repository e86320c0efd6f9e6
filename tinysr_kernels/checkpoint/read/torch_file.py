"""A file of torch.save, zip archive or the older stream, read without torch.load: see `pickled`.

Every storage that the pickle speaks of must have exactly its bytes in the file; a tensor is a view of its storage's.

Zip (torch.serialization._save): `data.pkl`, `data/KEY` for each storage, `byteorder`. The older stream
(torch.serialization._legacy_save): five pickles, a magic number, a version, facts about the machine, the value and the
keys of its storages; then for each key an int64, the number of its elements, and their bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.read import archive
from tinysr_kernels.checkpoint.read.paths import MappedFile
from tinysr_kernels.checkpoint.read.pickled import SIZE_LIMIT, interpret
from tinysr_kernels.checkpoint.read.stored import Malformed, Refused, StoredTensor
from tinysr_kernels.errors import CheckpointError, shorten

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class TorchFile:
    """The value that a file of torch.save holds, and its tensors."""

    def __init__(self, file: MappedFile) -> None:
        """Raises CheckpointError for a file that is damaged, refused or not one of torch.save."""
        self._file = file
        self._byte_order = "little"
        self._offsets: dict[str, int] = {}
        self._flat: dict[str, Tensor] = {}
        read = self._read_zip if file.read(0, min(4, file.size)) == archive.MAGIC else self._read_stream
        try:
            self.content: Any = read()
        except Refused as refused:
            raise self._refusal(f"the object {shorten(refused)}") from refused
        except Malformed as error:
            raise self._error(f"in its pickle {shorten(error, 300)}") from error

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor of a description in `content`; it shares memory with others of the same storage."""
        storage = stored.storage
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        if storage.key not in self._flat:
            assert storage.dtype is not None  # a StoredTensor's is known
            offset = self._offsets[storage.key]
            self._flat[storage.key] = self._file.flat(storage.dtype, offset, storage.numel, self._byte_order)
        flat = self._flat[storage.key]
        if flat.dtype != stored.dtype:  # an untyped storage is one of bytes
            flat = flat[: flat.numel() // stored.dtype.itemsize * stored.dtype.itemsize].view(stored.dtype)
        return flat.as_strided(stored.shape, stored.stride, stored.offset)

    # ------------------------------------------------------------------------------------ the two formats
    def _read_zip(self) -> Any:
        records = archive.read_records(self._file)
        if "constants.pkl" in records or any(name.startswith("code/") for name in records):
            raise self._refusal("a TorchScript program")
        if "data.pkl" not in records:
            raise self._error("no record data.pkl")
        if records["data.pkl"].size > SIZE_LIMIT:
            raise self._error(f"a pickle of {records['data.pkl'].size} bytes, expected at most {SIZE_LIMIT}")
        if "byteorder" in records:
            self._byte_order = "big" if self._content(records["byteorder"]) == b"big" else "little"
        found = interpret(self._content(records["data.pkl"]))
        for key, storage in found.storages.items():
            record = records.get(f"data/{key}")
            size = record.size if record else 0
            if record is None or size // storage.itemsize != storage.numel:
                raise self._error(
                    f"{size} bytes in data/{shorten(key, 50)}, expected {storage.numel} x {storage.itemsize}"
                )
            self._offsets[key] = record.offset
        return found.value

    def _content(self, record: archive.Record) -> bytes:
        return archive.read_record(self._file, record)

    def _read_stream(self) -> Any:
        data = self._file.data
        magic = interpret(data)
        if type(magic.value) is not int or magic.value != LEGACY_MAGIC:
            raise self._error("another kind of file, perhaps a pickle or a tar archive")
        version = interpret(data, magic.end)
        machine = interpret(data, version.end)
        found = interpret(data, machine.end)
        names = interpret(data, found.end)
        keys = names.value if type(names.value) is list else []
        if any(type(key) is not str for key in keys) or sorted(keys) != sorted(found.storages):
            raise self._error("other storages than its tensors need")
        position = names.end
        for key in keys:
            storage = found.storages[key]
            if int.from_bytes(self._file.read(position, 8), "little") != storage.numel:
                raise self._error(f"another size for storage {shorten(key, 50)} than {storage.numel} elements")
            self._offsets[key] = position + 8
            position += 8 + storage.numel * storage.itemsize
        self._file.read(position, 0)  # it reaches so far
        return found.value

    # ------------------------------------------------------------------------------------------- errors
    def _error(self, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: damaged, truncated or not a PyTorch file: {found}; fetch it again, or save its "
            "tensors again with torch.save or as safetensors"
        )

    def _refusal(self, more: str) -> CheckpointError:
        return CheckpointError(
            f"{self._file.path}: refused: besides tensors it holds {more}, and loading that could run code. Nothing "
            "was run. If you trust where the file comes from, rewrite it once as plain tensors, in an environment that "
            f'has what it needs: d = torch.load({self._file.path.name!r}, weights_only=False, map_location="cpu"); '
            'd = d.get("state_dict", d); torch.save({k: v for k, v in d.items() if torch.is_tensor(v)}, "weights.pt")'
        )
