"""What the self-check checks: an operator's call as data, so that another process can make it, and what identifies it.

    {"op": "layer_norm", "arguments": {"x": {"tensor": 0, "dtype": "float16", "shape": [...], "stride": [...],
     "offset": 0}, "eps": 1e-06, "dtype": {"dtype": "uint8"}}}

A tensor stands for its shape, dtype and strides; equal numbers after "tensor" are the same tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch import configs
from tinysr_kernels.launch.config_file import hashes_of
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.ops import REGISTRY, Operator


@dataclass(frozen=True)
class Item:
    """A call to check. key: equal for calls that launch the same kernels on tensors of the same shapes.

    kernels: the hash of the kernels' source (`config_file.hashes_of`).
    """

    key: str
    op: str
    variant: str
    kernels: str
    call: dict[str, Any]


def items_of(calls: Iterable[Operator | None], gpu: Gpu) -> list[Item]:
    """The distinct calls whose kernels would run on this GPU, in order of their first occurrence."""
    found: dict[str, Item] = {}
    for call in calls:
        if call is not None and call.kernels_apply and gpu.capability >= call.capability:
            item = item_of(call, gpu)
            found.setdefault(item.key, item)
    return list(found.values())


def item_of(call: Operator, gpu: Gpu) -> Item:
    """The call with its launch configuration on this GPU, which is part of the key as the kernels' source is."""
    data, kernels = to_data(call), hashes_of(type(call))["kernel_hash"]
    config = dataclasses.asdict(call.choose(gpu).config)
    text = json.dumps([data, config, configs.pdl(gpu), kernels], sort_keys=True)
    return Item(hashlib.sha256(text.encode()).hexdigest()[:16], call.name, call.bucket(), kernels, data)


def to_data(call: Operator) -> dict[str, Any]:
    """The call as JSON; see the module's docstring."""
    numbers: dict[int, int] = {}
    return {"op": call.name, "arguments": {name: _encode(v, numbers) for name, v in call.arguments.items()}}


def _encode(value: Any, numbers: dict[int, int]) -> Any:
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if not isinstance(value, Tensor):
        return value
    return {
        "tensor": numbers.setdefault(id(value), len(numbers)),
        "dtype": _name(value.dtype),
        "shape": list(value.shape),
        "stride": list(value.stride()),
        "offset": value.storage_offset(),
    }


def from_data(data: dict[str, Any]) -> Operator:
    """The call on meta tensors."""
    made: dict[int, Tensor] = {}
    return REGISTRY[data["op"]](**{name: _decode(value, made) for name, value in data["arguments"].items()})


def _decode(value: Any, made: dict[int, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    dtype: torch.dtype = getattr(torch, value["dtype"])
    if "tensor" not in value:
        return dtype
    if value["tensor"] not in made:
        shape, stride, offset = value["shape"], value["stride"], value["offset"]
        extent = offset + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        storage = torch.empty(extent, dtype=dtype, device="meta")
        made[value["tensor"]] = storage.as_strided(shape, stride, offset)
    return made[value["tensor"]]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
