"""trace: the launches of a function, on meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from tinysr_kernels.ops.registry import REGISTRY
from tinysr_kernels.ops.trace import trace


def test_calls_in_order_with_their_costs() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    x, weight = torch.empty(1, 48, 4, 6, **half), torch.empty(60, 48, 3, 3, **half)

    def network(image: Tensor) -> Tensor:
        y = torch.ops.tinysr.conv3x3(image, weight, activation="relu")
        tokens = y.permute(0, 2, 3, 1).reshape(1, 24, 60)  # a view: no launch
        return torch.ops.tinysr.layer_norm(tokens, 1e-6)

    calls = trace(network, x)
    assert [call.op for call in calls] == ["conv3x3", "layer_norm"]
    assert calls[0].inputs == ((1, 48, 4, 6), (60, 48, 3, 3))
    assert calls[0].output == (1, 60, 4, 6)
    assert calls[0].cost == REGISTRY["conv3x3"].cost(x, weight, activation="relu")
    assert calls[1].cost.bytes == 2 * 2 * 24 * 60


def test_foreign_kernels_are_counted_too() -> None:
    x = torch.empty(3, 5, device="meta")
    (call,) = trace(lambda t: t + t, x)
    assert call.op == "aten::add"
    assert call.cost.bytes == 4 * 15 * 2
