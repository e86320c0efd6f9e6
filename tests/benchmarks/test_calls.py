"""The operator calls for static checks, benchmarks and tuning: those of the networks, each once, in any dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.static.network_calls import CALLS, distinct_calls, main_calls
from benchmarks.subjects.networks import DTYPES
from tinysr_kernels.ops import REGISTRY


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_every_operator_is_called_by_some_network(op: str) -> None:
    calls = list(CALLS[op](torch.float16))
    assert calls
    for call in calls:
        assert all(t.is_meta for t in call.tensors)
        call.check()


@pytest.mark.parametrize("op", ["sepconv", "linear"])
def test_calls_are_distinct_and_the_same_in_every_dtype(op: str) -> None:
    def shapes(dtype: torch.dtype) -> list[str]:
        return [
            str({k: (v.shape, v.stride()) if isinstance(v, Tensor) else v for k, v in c.arguments.items()})
            for c in CALLS[op](dtype)
        ]

    half = shapes(torch.float16)
    assert half == shapes(torch.bfloat16) == shapes(torch.float32)
    for call in CALLS[op](torch.bfloat16):
        assert not any(v.dtype == torch.float16 for v in call.tensors)
    assert len(set(half)) == len(half)


def test_the_shapes_of_released_networks_are_included() -> None:
    """TinySR's GEMMs and AdcSR's head dimension, each in its family's own dtype."""
    linear = {(dtype, tuple(c.weight.shape)) for dtype, c in main_calls("linear")}
    assert {("float16", (4608, 1536)), ("float16", (6144, 1536)), ("bfloat16", (7680, 960))} <= linear
    widths = {(dtype, c.qkv.shape[2] // 3 // c.heads) for dtype, c in main_calls("attention")}
    assert {("float16", 64), ("bfloat16", 48), ("bfloat16", 256)} <= widths
    batches = {one.call.first.shape[0] for one in distinct_calls()["linear"]}
    assert {1, 4, 8} <= batches
    assert all(name in DTYPES for one in distinct_calls()["linear"] for name in one.main)


def test_odd_channel_counts_are_included() -> None:
    channels = {call.first.shape[1] for op in ("sepconv", "conv3x3", "group_norm") for call in CALLS[op](torch.float16)}
    assert {63, 10, 45, 30, 210} <= channels
