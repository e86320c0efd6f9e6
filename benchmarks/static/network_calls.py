"""The operator calls of the real networks, on meta tensors; static, micro and autotune iterate over them.

Traced from the networks' dispatch, each distinct call once: all families at 128x128 -> 512x512 and at twice that, where
TinySR's transformer runs in batches of windows; one and four images; and small networks with odd channel counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.static.plan import calls
from benchmarks.subjects.networks import DTYPES, OWN_DTYPE, VARIANTS, network
from tinysr_kernels.ops import REGISTRY, Operator

SIZES = ((128, 128), (256, 256))
BATCHES = (1, 4)
AWKWARD_SIZE = (72, 104)
LARGE = 256
"""Image height from which a norm in a convolution's prologue may be faster than a launch of its own."""
HALF = torch.float16


@dataclass
class NetworkCall:
    """A distinct call, in half precision. main: the dtypes in which a released network makes it for one 128x128 image.

    Networks run with their own color fix, and with wavelet, which users may select.
    """

    call: Operator
    main: set[str] = field(default_factory=set)


@functools.cache
def distinct_calls() -> Mapping[str, list[NetworkCall]]:
    """The distinct calls of all networks, by operator."""
    distinct: dict[str, dict[Any, NetworkCall]] = {name: {} for name in REGISTRY}
    for family, variants in VARIANTS.items():
        for variant in variants:
            awkward = variant.startswith("awkward")
            model = network(family, variant, HALF)
            sizes = (AWKWARD_SIZE,) if awkward else SIZES
            runs = [(model.color_fix, size, batch) for size in sizes for batch in BATCHES]
            for color_fix, size, batch in [*runs, ("wavelet", sizes[0], 1)]:
                model.color_fix = color_fix
                main = size == SIZES[0] and batch == 1 and variant != "large"
                for traced in calls(model, *size, batch, plan_launches=False):
                    if traced.operator is not None:
                        one = distinct[traced.op].setdefault(_key(traced.operator), NetworkCall(traced.operator))
                        one.main |= {OWN_DTYPE[family]} if main else set()
    convolutions = distinct["conv3x3"]
    for one in list(convolutions.values()):
        if one.main and one.call.arguments["norm_moments"] is None and one.call.first.shape[2] >= LARGE:
            normed = _normed(one.call)
            convolutions.setdefault(_key(normed), NetworkCall(normed)).main |= one.main
    return {name: list(by_key.values()) for name, by_key in distinct.items()}


def _normed(call: Operator) -> Operator:
    """The convolution call with a GroupNorm and SiLU prologue, for which the heuristic chooses another kernel."""
    x = call.first
    n, c = x.shape[:2]
    norm = {"norm_moments": x.new_empty((n, 2, c), dtype=torch.float32), "norm_groups": 1, "norm_eps": 1e-5}
    norm |= {name: x.new_empty(c, dtype=torch.float32) for name in ("norm_weight", "norm_bias")}
    return type(call)(**{**call.arguments, **norm})


def _key(call: Operator) -> Any:
    """Equal for calls that differ only in the values of their tensors."""

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.dtype, value.shape, value.stride(), value.storage_offset()

    return tuple(of(value) for value in call.arguments.values())


def network_calls(op: str, dtype: torch.dtype) -> Iterator[Operator]:
    """All distinct calls of an operator in a compute dtype; float32 arguments stay float32."""
    for one in distinct_calls()[op]:
        yield _in_dtype(one.call, dtype)


def main_calls(op: str, dtype: str | None = None) -> Iterator[tuple[str, Operator]]:
    """(dtype, call) of the released networks for one 128x128 image, in their own dtypes or in `dtype`."""
    for one in distinct_calls()[op]:
        for name in sorted(one.main):
            if dtype is None:
                yield name, _in_dtype(one.call, DTYPES[name])
        if dtype is not None and one.main:
            yield dtype, _in_dtype(one.call, DTYPES[dtype])


def _in_dtype(call: Operator, dtype: torch.dtype) -> Operator:
    def convert(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.dtype == HALF else value
        return dtype if value is HALF else value

    return type(call)(**{name: convert(value) for name, value in call.arguments.items()})


CALLS: dict[str, Callable[[torch.dtype], Iterator[Operator]]] = {
    name: functools.partial(network_calls, name) for name in sorted(REGISTRY)
}
