"""Registering an operator that leaves something of its result beside it, for whatever normalises the result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.registry import Implementation, Operator, register


def register_beside(
    operator: Operator,
    schema: str,
    suffix: str,
    operator_fake: Callable[..., Tensor],
    of: Callable[[Tensor], Tensor],
    empty: Callable[[Tensor], Tensor],
    kernels: Implementation | None,
) -> Operator:
    """Register `<name>_<suffix>(...) -> (out, of(out))` beside an operator of this schema.

    of: the second result's mathematics in plain PyTorch; empty: its fake, uninitialised.
    """

    @functools.wraps(operator.reference)
    def reference(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out = operator.reference(*args, **kwargs)
        return out, of(out)

    def fake(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        out = operator_fake(*args, **kwargs)
        return out, empty(out)

    @functools.wraps(operator.cost)
    def cost(*args: Any, **kwargs: Any) -> Cost:
        """The operator's own, 3 FLOPs per element of the result, and the bytes of what is left beside it."""
        least, (out, left) = operator.cost(*args, **kwargs), fake(*args, **kwargs)
        return Cost(least.flops + 3 * out.numel(), least.bytes + left.numel() * left.element_size())

    named = schema.replace(f"{operator.name}(", f"{operator.name}_{suffix}(", 1)
    return register(named.replace("-> Tensor", "-> (Tensor, Tensor)"), reference, fake, cost, kernels)
