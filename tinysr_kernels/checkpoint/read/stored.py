"""What a pickle of torch.save speaks of: storages, the calls that rebuild tensors in them, and what else may be named.

The names: torch/_weights_only_unpickler.py (`_get_allowed_globals`) and torch/_utils.py (`_rebuild_*`). Nothing here is
called or looked up but dtypes; a call becomes a description, checked against the storage that it refers to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tinysr_kernels.checkpoint.read.paths import is_shape


class Malformed(ValueError):
    """A pickle that torch.save did not write so: damaged, hostile or of another program."""


class Refused(Exception):
    """A pickle that names something which could run code when it is loaded. The argument is the name."""


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A tensor's memory: the file's name for it, and how many elements of which type. dtype None: quantized."""

    key: str
    dtype: torch.dtype | None
    itemsize: int
    numel: int


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A strided tensor: offset and strides in elements of `dtype`, all within its storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Inert:
    """Something that is neither a tensor to be used nor a plain value; `kind` names it."""

    kind: str
    is_tensor: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Global:
    """A class or function that a pickle names."""

    name: str


# ---------------------------------------------------------------------------------------------- names
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128, "ComplexFloatStorage": torch.complex64,
    "storage.UntypedStorage": torch.uint8, "UntypedStorage": torch.uint8,
}  # fmt: skip
_NEW_DTYPES = tuple(
    f"torch.{name}"
    for name in ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
)
"""Types without a storage class of their own: _rebuild_tensor_v3 takes bytes and one of these."""
_QUANTIZED = {"QUInt8Storage": 1, "QInt8Storage": 1, "QInt32Storage": 4}
_REBUILD = "torch._utils._rebuild_"
_REBUILD_SUBCLASS = "torch._tensor._rebuild_from_type_v2"
_WRAPPERS = ("parameter", "parameter_with_state", "device_tensor_from_cpu_tensor")
"""Functions whose first argument is the tensor."""
_KINDS = {
    "sparse_tensor": "a sparse tensor",
    "qtensor": "a quantized tensor",
    "meta_tensor_no_storage": "a tensor on the meta device",
    "nested_tensor": "a nested tensor",
}
_PLAIN_CLASSES = ("torch.Tensor", "torch.nn.parameter.Parameter")
_INERT = {
    *_PLAIN_CLASSES,
    _REBUILD_SUBCLASS,
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "_codecs.encode",
    "collections.Counter",
    "collections.OrderedDict",
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
}


def is_allowed(name: str) -> bool:
    """Whether weights_only allows it; that it does nothing here anyway is the second line of defense."""
    module, _, last = name.rpartition(".")
    if name in _INERT or name.startswith(_REBUILD):
        return True
    if module in ("torch", "torch.cuda", "torch.storage"):
        return last.endswith(("Storage", "Tensor")) or isinstance(_of_torch(last), (torch.dtype, torch.qscheme))
    return False


def _of_torch(name: str) -> object:
    """A name of torch that is there already: torch's own __getattr__ could import something."""
    return vars(torch).get(name)


# ---------------------------------------------------------------------------------------------- calls
def storage_of(found: Any) -> Storage:
    """The storage of a persistent id: ("storage", its class, key, device, numel[, None])."""
    if type(found) is not tuple or len(found) not in (5, 6) or not (found[5:] == () or found[5] is None):
        raise Malformed("a persistent id that is no storage's")
    word, kind, key, _, numel = found[:5]
    if not (type(word) is str and word == "storage" and type(kind) is Global and type(key) is str):
        raise Malformed("a persistent id that is no storage's")
    name = kind.name.removeprefix("torch.").removeprefix("cuda.")
    if not is_shape((numel,)) or not (name in _STORAGES or name in _QUANTIZED):
        raise Malformed(f"a storage of the unknown type {kind.name[:100]!r}, or of too many elements")
    dtype = _STORAGES.get(name)
    return Storage(key, dtype, dtype.itemsize if dtype else _QUANTIZED[name], numel)


def kind_of(value: Any) -> str:
    """What a value is, for messages."""
    return value.kind if isinstance(value, Inert) else value.name if isinstance(value, Global) else type(value).__name__


def called(name: str, arguments: tuple[Any, ...]) -> Any:
    """The description that replaces the result of a call that weights_only would make."""
    if name == _REBUILD_SUBCLASS and len(arguments) == 4:
        function, kind, inner, _ = arguments  # a tensor with attributes, or of a subclass
        plain = type(kind) is Global and kind.name in _PLAIN_CLASSES
        if plain and type(function) is Global and function.name.startswith(_REBUILD) and type(inner) is tuple:
            name, arguments = function.name, inner
    if not name.startswith(_REBUILD):
        is_tensor = name == _REBUILD_SUBCLASS or name.endswith("Tensor") or name in _PLAIN_CLASSES
        return Inert("a tensor of another class" if is_tensor else name, is_tensor)
    kind = name.removeprefix(_REBUILD)
    if kind in _WRAPPERS and arguments and isinstance(arguments[0], (StoredTensor, Inert)):
        return arguments[0]
    if kind in ("tensor", "tensor_v2", "tensor_v3") and len(arguments) >= 4:
        return _tensor(kind, arguments)
    return Inert(_KINDS.get(kind, "a tensor of another class"), is_tensor=True)


def _tensor(kind: str, arguments: tuple[Any, ...]) -> StoredTensor | Inert:
    """_rebuild_tensor(storage, offset, shape, stride), _v2(..., requires_grad, hooks[, metadata]), _v3 with a dtype."""
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage):
        raise Malformed(f"a tensor in {kind_of(storage)} instead of a storage")
    if storage.dtype is None:
        return Inert("a quantized tensor", is_tensor=True)
    dtype, metadata = storage.dtype, arguments[6:7]
    if kind == "tensor_v3":
        name = kind_of(arguments[6]) if len(arguments) > 6 else "no dtype"
        found = _of_torch(name.removeprefix("torch."))
        if not isinstance(found, torch.dtype) or name not in _NEW_DTYPES:
            return Inert(f"a tensor of {name}", is_tensor=True)
        dtype, metadata = found, arguments[7:8]
    if metadata and metadata[0]:
        return Inert("a conjugated or negated view", is_tensor=True)
    if not (is_shape(shape) and _is_count(offset)):
        raise Malformed("a tensor without a shape, or of too many elements")
    if not (type(stride) is tuple and len(stride) == len(shape) and all(map(_is_count, stride))):
        raise Malformed(f"a tensor of shape {list(shape)} without fitting strides")
    held = storage.numel * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if all(shape) and last >= held:
        raise Malformed(f"a tensor of shape {list(shape)} whose last element is number {last} of a storage of {held}")
    return StoredTensor(storage, dtype, offset, tuple(shape), stride)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48
