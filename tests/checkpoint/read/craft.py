"""Pickles and archives that torch.save never writes, opcode by opcode and record by record."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

END = b"."
MEMO = b"q\x00"
RECALL = b"h\x00"


def text(value: str) -> bytes:
    """BINUNICODE."""
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    """BININT or LONG1."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def tuple_of(*items: bytes) -> bytes:
    """TUPLE of values."""
    return b"(" + b"".join(items) + b"t"


def name(module: str, last: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{last}\n".encode()


def call(module: str, last: str, *arguments: bytes) -> bytes:
    """REDUCE."""
    return name(module, last) + tuple_of(*arguments) + b"R"


def storage(numel: int, key: str = "0", kind: str = "FloatStorage") -> bytes:
    """The persistent id of a storage."""
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), integer(numel)) + b"Q"


def tensor(
    numel: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    key: str = "0",
    kind: str = "FloatStorage",
) -> bytes:
    """A tensor in a storage of `numel` elements."""
    sizes, strides = (tuple_of(*map(integer, values)) for values in (shape, stride))
    hooks = call("collections", "OrderedDict")
    arguments = (storage(numel, key, kind), integer(offset), sizes, strides, b"\x89", hooks)
    return call("torch._utils", "_rebuild_tensor_v2", *arguments)


def state(*items: tuple[bytes, bytes]) -> bytes:
    """A whole pickle of one dict."""
    return b"\x80\x02}(" + b"".join(key + value for key, value in items) + b"u" + END


def archive(path: Path, data: bytes, records: Mapping[str, bytes] | None = None) -> Path:
    """A zip archive like torch.save's with this pickle; by default `data/0` has two float32."""
    with zipfile.ZipFile(path, "w") as written:
        written.writestr("archive/data.pkl", data)
        for record, content in ({"data/0": bytes(8)} if records is None else records).items():
            written.writestr(f"archive/{record}", content)
    return path
