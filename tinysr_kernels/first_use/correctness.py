"""Whether a configuration computes its operator correctly: the project's numeric contract, on random inputs.

The error against a float64 reference may be at most `factor` times that of eager PyTorch in the same dtype, which
rounds the output of every operation. Outputs are filled with NaN first, and a second run must be bitwise identical.
Autotuning judges candidates by this, the self-check the kernels on a user's GPU, `benchmarks correctness` all of them.
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

from tinysr_kernels.first_use.inputs import random_call
from tinysr_kernels.launch.plan import Plan
from tinysr_kernels.ops import Operator

FACTOR = 2.0
"""Times eager's error: the project's contract."""
SMALL = 1 << 16
"""Output elements up to which the errors of several random inputs are pooled, as those of few elements are noisy."""
DRAWS = 5


class RoundEachOp(TorchDispatchMode):
    """Rounds every operation's float32 output to a dtype, as eager PyTorch does in that dtype.

    inputs: tensors that are never rounded, even where an operation returns them.
    """

    def __init__(self, dtype: torch.dtype, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.dtype = dtype
        self.unrounded = {t.untyped_storage()._cdata for t in inputs}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            for t in _tensors(out):
                if t.dtype == torch.float32 and t.untyped_storage()._cdata not in self.unrounded:
                    t.copy_(t.to(self.dtype))
        return out


@dataclass(frozen=True)
class Expected:
    """Random inputs of a call with the float64 outputs and those of eager PyTorch, on the device."""

    call: Operator
    exact: tuple[Tensor, ...]
    eager: tuple[Tensor, ...]


def expected_results(call: Operator, device: torch.device, draw: int) -> list[Expected]:
    """What a call's outputs are compared with, for one seed; several sets of inputs where the output has few elements.

    call: on meta tensors.
    """
    first = _expected(call, device, DRAWS * draw)
    small = sum(t.numel() for t in first.exact) <= SMALL
    return [first, *(_expected(call, device, DRAWS * draw + i) for i in range(1, DRAWS if small else 1))]


def _expected(like: Operator, device: torch.device, seed: int) -> Expected:
    call = random_call(like, device, seed)
    exact = _tensors(type(call)(**{name: _double(value) for name, value in call.arguments.items()}).reference())
    eager = _tensors(call.reference())
    halves = {t.dtype for t in eager if t.dtype in (torch.float16, torch.bfloat16)}
    if halves:
        with RoundEachOp(halves.pop(), call.tensors):
            rounded = _tensors(call.reference())
        # Float32 outputs, such as channel statistics, are computed in float32 by eager too.
        eager = tuple(e if e.dtype == torch.float32 else r for e, r in zip(eager, rounded, strict=True))
    return Expected(call, exact, eager)


def _double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    # fp8 inputs are exact already, and operators that take fp8 accept nothing wider.
    wider = isinstance(value, Tensor) and value.dtype.is_floating_point and value.dtype.itemsize > 1
    return value.double() if wider else value


def check_results(config: Any, references: list[Expected], *, factor: float = FACTOR, pdl: bool = False) -> str | None:
    """What is wrong with the outputs of the configuration, or None. Raises what its launches raise.

    factor: times eager's error that is allowed. pdl: see `Launch.run`.
    """
    results = []
    for expected in references:
        plan = expected.call.plan(config)
        result = tuple(t.clone() for t in _tensors(poisoned(plan).run(pdl)))
        again = _tensors(poisoned(plan, zero=True).run(pdl))
        differs = any(not torch.equal(a, b) for a, b in zip(result, again, strict=True))
        # NaN never compares equal; it is reported below.
        if differs and all(bool(t.double().isfinite().all()) for t in result):
            return "the second run differs"
        results.append(result)
    found, allowed = _pooled(results, references), _allowed(results, references, factor)
    for error, bound in zip(found, allowed, strict=True):
        if not error <= bound:  # also true for NaN
            return f"relative error {error:.3g}, allowed {bound:.3g}"
    return None


def poisoned(plan: Plan, zero: bool = False) -> Plan:
    """The plan with every tensor that its launches write filled with NaN, so that unwritten elements are detected.

    Integers are set to their maximum, or to 0 if `zero`: unwritten elements then differ between two runs.
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


def _allowed(results: list[tuple[Tensor, ...]], references: list[Expected], factor: float) -> list[float]:
    """`factor` times eager's errors, and no less than that times the errors of rounding the exact outputs once."""
    rounded = [
        tuple(_like(e, r) for e, r in zip(expected.exact, result, strict=True))
        for expected, result in zip(references, results, strict=True)
    ]
    eager = _pooled([expected.eager for expected in references], references)
    pairs = list(zip(rounded, references, strict=True))
    least = [[u for r, e in zip(row, x.exact, strict=True) for u in _unit(r, e)] for row, x in pairs]
    floor = [max(column) for column in zip(*least, strict=True)]
    return [factor * max(three) for three in zip(eager, _pooled(rounded, references), floor, strict=True)]


def _like(exact: Tensor, result: Tensor) -> Tensor:
    to_integer = exact.dtype.is_floating_point and not result.dtype.is_floating_point
    return (exact.round() if to_integer else exact).to(result.dtype)


def _unit(rounded: Tensor, exact: Tensor) -> tuple[float, float]:
    """The errors, as `_errors` defines them, of rounding to 8 bits; 0 for other outputs.

    The float64 reference rounds such outputs too, so its error does not contain this rounding.
    """
    if rounded.dtype.itemsize > 1 or rounded.dtype == torch.bool:
        return 0.0, 0.0
    size = rounded.double().abs()
    if rounded.dtype.is_floating_point:
        kind: Any = torch.finfo(rounded.dtype)
        step = torch.exp2(size.clamp(min=kind.smallest_normal).log2().floor()) * kind.eps
    else:
        kind, step = torch.iinfo(rounded.dtype), torch.ones_like(size)
    # Values clamped to an end of the range are not rounded.
    step = torch.where((size == 0) | (size == kind.max), 0.0, step)
    return _relative(step.square().mean().div(12).sqrt() * math.sqrt(step.numel()), step.max() / 2, exact)


def _pooled(results: list[tuple[Tensor, ...]], references: list[Expected]) -> list[float]:
    """Relative errors of each output, root mean square and maximum, pooled over the sets of inputs."""
    rows = [
        [e for r, x in zip(result, expected.exact, strict=True) for e in _errors(r, x)]
        for result, expected in zip(results, references, strict=True)
    ]
    return [math.sqrt(math.fsum(e * e for e in column) / len(rows)) for column in zip(*rows, strict=True)]


def _errors(result: Tensor, exact: Tensor) -> tuple[float, float]:
    difference = result.double() - exact.double()
    return _relative(difference.norm(), difference.abs().max(), exact)


def _relative(norm: Tensor, maximum: Tensor, exact: Tensor) -> tuple[float, float]:
    """Root-mean-square and maximum error, relative to those of the exact output."""
    wide, tiny = exact.double(), torch.finfo(torch.float64).tiny
    return float(norm / wide.norm().clamp(min=tiny)), float(maximum / wide.abs().max().clamp(min=tiny))


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
