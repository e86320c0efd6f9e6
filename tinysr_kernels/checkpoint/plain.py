"""What a caller hands over in memory (tensors, modules, mappings, configurations) as plain dense tensors and values.

An object of the caller's may run code of its own when it is asked for something, and lie in what it answers. So it is
asked here alone, by its type rather than by its methods where that is possible, and whatever it raises becomes a
CheckpointError.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tinysr_kernels.checkpoint.read.header import TENSOR_LIMIT
from tinysr_kernels.errors import CheckpointError, shorten

MOST_VALUES = 1000
"""Of one level of a configuration."""
DEPTH = 4
"""Levels of nested lists and mappings that are looked into; what contains itself has more."""


def is_a(value: object, kind: type) -> bool:
    """`isinstance` by the true type: an object may claim any other with its `__class__`."""
    return issubclass(type(value), kind)


def kind_of(value: object) -> str:
    """The name of a value's type, for messages."""
    return shorten(type(value).__name__, 80)


def check_number(number: int, where: str) -> None:
    """CheckpointError for more tensors than a network has: looking at each of them could take for ever."""
    if number > TENSOR_LIMIT:
        raise CheckpointError(f"{where}: expected at most {TENSOR_LIMIT} tensors, found {number}: no network of ours")


def plain_tensor(value: object, where: str, *, copy: bool = False) -> Tensor:
    """A dense tensor on the CPU without a gradient, its memory as large as it claims; CheckpointError otherwise.

    It shares the caller's memory unless `copy`, or unless it lay elsewhere.
    """
    kind = type(value)
    if not issubclass(kind, Tensor):
        raise CheckpointError(f"{where}: expected a tensor, found {kind_of(value)}")
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # FakeTensor, DTensor: without plain memory
        raise CheckpointError(f"{where}: expected a plain dense tensor, found {kind_of(value)}")
    try:
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            tensor = Tensor.detach(value if kind is Tensor else Tensor.as_subclass(value, Tensor))  # type: ignore[arg-type]
            obstacle = _obstacle(tensor)
            if not obstacle:
                return tensor.to("cpu", copy=copy).resolve_conj().resolve_neg()
    except Exception as error:
        raise CheckpointError(f"{where}: this tensor cannot be read: {shorten(error)}") from error
    raise CheckpointError(f"{where}: expected a plain dense tensor, found {obstacle}")


def _obstacle(tensor: Tensor) -> str:
    """Why a tensor's elements cannot be read like those of any other; nothing if they can."""
    if tensor.is_nested:
        return "a nested one"
    if tensor.layout != torch.strided:
        return f"one of layout {tensor.layout}; call .to_dense()"
    if tensor.is_quantized:
        return "a quantized one; call .dequantize()"
    if tensor.is_meta:
        return "one on the device 'meta', which holds no values"
    held = tensor.untyped_storage().nbytes()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.numel() and (tensor.storage_offset() + last + 1) * tensor.element_size() > held:
        return f"one whose memory has been freed (sharded?): shape {list(tensor.shape)} in {held} bytes"
    if math.prod(tensor.shape) * tensor.element_size() > held:
        return f"an expanded one, shape {list(tensor.shape)} in {held} bytes; call .contiguous()"
    return ""


def plain_mapping(value: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """A mapping's items, its keys plain strings; CheckpointError for other keys."""
    try:
        check_number(len(value), where)
        items = list(value.items())
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{where}: this {kind_of(value)} cannot be read: {shorten(error)}") from error
    check_number(len(items), where)
    for name, _ in items:
        if not is_a(name, str):
            raise CheckpointError(f"{where}: expected names as keys, found {shorten(name, 120)} ({kind_of(name)})")
    return {str.__str__(name): item for name, item in items}


def plain_list(value: Any, where: str) -> list[Any]:
    """The entries of a list or tuple, whatever a class that derives from one makes of them; at most MOST_VALUES."""
    entries = [*(list.__iter__(value) if is_a(value, list) else tuple.__iter__(value))]
    if len(entries) > MOST_VALUES:
        raise CheckpointError(f"{where}: expected at most {MOST_VALUES} entries, found {len(entries)}")
    return entries


def module_state(module: nn.Module, label: str) -> dict[str, Any]:
    """A module's state dict, its values unchecked."""
    try:
        state = module.state_dict()
    except Exception as error:
        raise CheckpointError(f"{label}: its state_dict() raised {kind_of(error)}: {shorten(error)}") from error
    if not is_a(state, Mapping):
        raise CheckpointError(f"{label}: expected a mapping from its state_dict(), found {kind_of(state)}")
    return plain_mapping(state, label)


def module_config(module: nn.Module, label: str) -> tuple[dict[str, Any] | None, Any]:
    """A module's `config`: (its plain values, None) where it is a mapping, else (None, itself), which may be None."""
    try:
        config: Any = getattr(module, "config", None)
        if issubclass(type(config), Mapping):
            return plain_values(config), None
        return None, config
    except Exception as error:
        raise CheckpointError(f"{label}: its config cannot be read: {kind_of(error)}: {shorten(error)}") from error


def plain_values(values: Mapping[Any, Any]) -> dict[str, Any]:
    """A configuration as JSON would have it. What JSON has not becomes a text that names it, so that no check takes it
    for a number, and so do values below DEPTH levels."""
    return {name: _plain_value(value, DEPTH) for name, value in plain_mapping(values, "a mapping").items()}


def _plain_value(value: Any, depth: int) -> Any:
    if value is None or is_a(value, bool):
        return value
    for kind, number in ((int, numbers.Integral), (float, numbers.Real)):
        if is_a(value, number):
            return kind(value)
    if is_a(value, str):
        return str.__str__(value)
    if depth and (is_a(value, list) or is_a(value, tuple)):
        return [_plain_value(entry, depth - 1) for entry in plain_list(value, "a list")]
    return f"<{kind_of(value)}>"
