"""What a network launches: every operator call in order, with its cost, counted from the actual dispatch.

Run on meta tensors it needs neither memory nor time, so plans of full-size networks can be made anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tinysr_kernels.ops.registry import REGISTRY, Cost, size


@dataclass(frozen=True)
class Call:
    """One call: operator, shapes of its tensor inputs and of its first output, cost and bytes alive for it.

    source: where its launch configuration comes from, "reference" for a call that no kernel computes.
    """

    op: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    cost: Cost
    source: str = "reference"


class _Recorder(TorchDispatchMode):
    """Notes `tinysr::` calls with their own cost functions and other kernels as one read and one write."""

    def __init__(self, kernels: bool) -> None:
        super().__init__()
        self.kernels = kernels
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        first = out[0] if isinstance(out, (tuple, list)) else out
        if not isinstance(first, Tensor) or _is_view(func):
            return out
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [t for t in flat if isinstance(t, Tensor)]
        source = "reference"
        if func.namespace == "tinysr":
            name = func._schema.name.removeprefix("tinysr::")
            operator = REGISTRY[name]
            cost = operator.cost(*args, **kwargs)
            if self.kernels and operator.kernels and operator.kernels.takes(operator.arguments(*args, **kwargs)):
                source = operator.plan(*args, **kwargs)[1].source
        else:
            name = func._schema.name
            cost = Cost(first.numel(), size(*tensors) + size(first))
        shapes = tuple(tuple(t.shape) for t in tensors)
        self.calls.append(Call(name, shapes, tuple(first.shape), cost, source))
        return out


def _is_view(func: Any) -> bool:
    """Whether the call only makes another view (or an empty tensor) and launches nothing."""
    if func.is_view or func._schema.name.startswith(("aten::empty", "aten::new_empty")):
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@torch.inference_mode()
def trace(function: Callable[..., Any], *args: Any, kernels: bool = False) -> list[Call]:
    """Run `function(*args)` (usually a network on meta tensors) and return its calls in order.

    kernels: say where each call's launch configuration would come from, as if kernels ran.
    """
    recorder = _Recorder(kernels)
    with recorder:
        function(*args)
    return recorder.calls
