"""Whether a configuration computes what its operation says: the project's contract on numbers, on random inputs.

The error against a float64 reference may be twice that of eager PyTorch in the same dtype, which rounds the result of
every operation; outputs are poisoned first, and a second run must give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autotune.items.answers import Failure
from autotune.items.work import Item
from benchmarks.subjects.inputs import drawn
from tinysr_kernels.launch.plan import Plan
from tinysr_kernels.ops import Operator

FEW = 1 << 16
"""Elements of a result up to which several draws are pooled, because the errors of a handful are mostly luck."""
DRAWS = 5


class EachRounded(TorchDispatchMode):
    """Inside, every operation's float32 result is rounded to a dtype, as eager PyTorch would in that dtype.

    inputs: tensors that stay as they are, whatever an operation hands through.
    """

    def __init__(self, dtype: torch.dtype, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.dtype = dtype
        self.kept = {t.untyped_storage()._cdata for t in inputs}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for t in _tensors(out):
                if t.dtype == torch.float32 and t.untyped_storage()._cdata not in self.kept:
                    t.copy_(t.to(self.dtype))
        return out


@dataclass(frozen=True)
class Truth:
    """One draw of an item's inputs with the exact result and eager's, on the device."""

    call: Operator
    exact: tuple[Tensor, ...]
    eager: tuple[Tensor, ...]


def truths(item: Item, device: torch.device, draw: int) -> list[Truth]:
    """What results are compared with; a few draws where the result has few elements."""
    first = _truth(item, device, DRAWS * draw)
    few = sum(t.numel() for t in first.exact) <= FEW
    return [first, *(_truth(item, device, DRAWS * draw + i) for i in range(1, DRAWS if few else 1))]


def _truth(item: Item, device: torch.device, seed: int) -> Truth:
    call = drawn(item.call, device, seed)
    exact = _tensors(type(call)(**{name: _double(value) for name, value in call.arguments.items()}).reference())
    eager = _tensors(call.reference())
    halves = {t.dtype for t in eager if t.dtype in (torch.float16, torch.bfloat16)}
    if halves:
        with EachRounded(halves.pop(), call.tensors):
            coarse = _tensors(call.reference())
        # What the operation gives in float32, such as moments, eager too computes in float32.
        eager = tuple(e if e.dtype == torch.float32 else c for e, c in zip(eager, coarse, strict=True))
    return Truth(call, exact, eager)


def _double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    # Floats of 8 bits are exact already, and what takes them takes nothing else.
    wider = isinstance(value, Tensor) and value.dtype.is_floating_point and value.dtype.itemsize > 1
    return value.double() if wider else value


def verdict(item: Item, config: Any, known: list[Truth]) -> Failure | None:
    """What is wrong with the configuration's results, if anything is. Raises what its launches raise."""
    results = []
    for truth in known:
        plan = truth.call.plan(config)
        result = tuple(t.clone() for t in _tensors(poisoned(plan).run()))
        again = _tensors(poisoned(plan, zero=True).run())
        differs = any(not torch.equal(a, b) for a, b in zip(result, again, strict=True))
        # NaN equals nothing, and is told of below.
        if differs and all(bool(t.double().isfinite().all()) for t in result):
            return Failure("wrong", "another result in the second run")
        results.append(result)
    found, allowed = _pooled(results, known), _allowed(results, known)
    for error, bound in zip(found, allowed, strict=True):
        if not error <= bound:  # nor is NaN
            return Failure("wrong", f"relative error {error:.3g}, at most {bound:.3g} is right")
    return None


def poisoned(plan: Plan, zero: bool = False) -> Plan:
    """The plan with every tensor that its launches will write filled with NaN: what is not written shows.

    Whole numbers become the largest there are, or on request 0: what is not written differs between the two.
    """
    written = list(_tensors(plan.result))
    for launch in plan.launches:
        scratch = (v for name, v in launch.arguments.items() if name.startswith("scratch"))
        written += [t for t in scratch if isinstance(t, Tensor)]
    for t in written:
        if t.dtype.is_floating_point:
            t.fill_(math.nan)
        else:
            t.fill_(0 if zero else 1 if t.dtype == torch.bool else torch.iinfo(t.dtype).max)
    return plan


def _allowed(results: list[tuple[Tensor, ...]], known: list[Truth]) -> list[float]:
    """Twice eager's errors, or twice those of the exact results once rounded where eager had luck."""
    rounded = [
        tuple(_like(e, r) for e, r in zip(truth.exact, result, strict=True))
        for truth, result in zip(known, results, strict=True)
    ]
    eager = _pooled([truth.eager for truth in known], known)
    pairs = list(zip(rounded, known, strict=True))
    least = [[u for r, e in zip(row, x.exact, strict=True) for u in _unit(r, e)] for row, x in pairs]
    floor = [max(column) for column in zip(*least, strict=True)]
    return [2 * max(three) for three in zip(eager, _pooled(rounded, known), floor, strict=True)]


def _like(exact: Tensor, result: Tensor) -> Tensor:
    whole = exact.dtype.is_floating_point and not result.dtype.is_floating_point
    return (exact.round() if whole else exact).to(result.dtype)


def _unit(rounded: Tensor, exact: Tensor) -> tuple[float, float]:
    """The errors, as `_errors` counts them, of rounding to 8 bits; 0 for other results.

    The reference rounds such a result too, in whatever precision: its own rounding is in none of its errors.
    """
    if rounded.dtype.itemsize > 1 or rounded.dtype == torch.bool:
        return 0.0, 0.0
    size = rounded.double().abs()
    if rounded.dtype.is_floating_point:
        kind: Any = torch.finfo(rounded.dtype)
        step = torch.exp2(size.clamp(min=kind.smallest_normal).log2().floor()) * kind.eps
    else:
        kind, step = torch.iinfo(rounded.dtype), torch.ones_like(size)
    # What is clamped to an end of the range is not rounded.
    step = torch.where((size == 0) | (size == kind.max), 0.0, step)
    return _relative(step.square().mean().div(12).sqrt() * math.sqrt(step.numel()), step.max() / 2, exact)


def _pooled(results: list[tuple[Tensor, ...]], known: list[Truth]) -> list[float]:
    """Relative errors of each tensor, in the mean square and of the worst element, pooled over the draws."""
    rows = [
        [e for r, x in zip(result, truth.exact, strict=True) for e in _errors(r, x)]
        for result, truth in zip(results, known, strict=True)
    ]
    return [math.sqrt(math.fsum(e * e for e in column) / len(rows)) for column in zip(*rows, strict=True)]


def _errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = result.double() - exact.double()
    return _relative(difference.norm(), difference.abs().max(), exact)


def _relative(whole: Tensor, worst: Tensor, exact: Tensor) -> tuple[float, float]:
    """Errors in the mean square and of the worst element, over the size of the exact result."""
    wide, tiny = exact.double(), torch.finfo(torch.float64).tiny
    return float(whole / wide.norm().clamp(min=tiny)), float(worst / wide.abs().max().clamp(min=tiny))


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
