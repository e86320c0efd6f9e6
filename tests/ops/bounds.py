"""How large an error may be: the one place where the bound on every operator's and kernel's error is derived.

An error is held to twice that of PyTorch's eager computation in the same dtype, or to a bound from the arithmetic,
whichever is larger. Eager's error alone is no bound: on a few elements it is mostly luck, and the luck differs between
MKL, oneDNN, instruction sets and thread counts.

The bound from the arithmetic, c * eps * sqrt(terms) * magnitude, is the random walk of rounding errors (Higham,
"Accuracy and Stability of Numerical Algorithms", section 2.8):

- An operation rounds its result r by a relative error of at most u = eps / 2. Spread evenly over [-u, u], its root mean
  square is u / sqrt(3).
- An element y = sum of s_i of K summands takes terms = 2K operations. Each product is rounded once, which adds up to
  S^2 = sum of s_i^2, the squared magnitude, times u^2 / 3. Each of the K partial sums is rounded once. Where the
  summands' signs are random, as in the tests' cases, the k-th is k / K * S^2 in the mean square: K / 2 * S^2 together.
- The errors are independent, so that their squares add up: E[e^2] = (1 + terms / 4) * u^2 / 3 * S^2. That is the sum in
  a row; sums in lanes or by halves, and fused multiply-adds, only round less.
- An input that is off by the relative error d_i, drawn independently from [-u, u], moves y by a mean square of
  u^2 / 3 * S^2. So the float64 mathematics itself yields the bound, through norms, softmax and activations too, if it
  is done on inputs that are off by d_i * sqrt(1 + terms / 4): the response. Its error is taken as a result's is, in the
  mean square and of the worst element, which on n elements is about sqrt(2 ln n) times as large.
- References and kernels compute in float32 or wider, so u is float32's for 16 bits as well; the result is then rounded
  once to its dtype, which is measured on the exact result and independent of the rest.

The bound is FACTOR = 2 times that, so c = 2 * (u / eps) / sqrt(3) / sqrt(4) = 0.29 for long sums, or 0.41 where both
factors of a product are inputs. 2 covers the spread of a mean square over few elements: the smallest case in the
interpreter has 9 (3 elements, 3 draws), and the mean of 9 squared normal errors is above 4 times its expectation with a
probability of 4e-5.

What this still catches: the longest sums here have 2160 summands, whose float32 errors are held to 2 * sqrt(1081) = 66
roundings; a product in TF32 or a sum kept in 16 bits errs by 2^11 or more. In 16 bits the bound is twice one rounding
of the result plus next to nothing. `test_bounds.py`, `test_mutants_are_caught` and `make mutations`
hold it to that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FACTOR = 2
"""Times eager's error, and times the expected error of the arithmetic."""
RESPONSES = 8
"""Of each draw, so that their spread does not count beside the result's own."""
EXACT = 1e-12  # float64 keeps 16 digits; what is left allows for the order of a few thousand terms


class Verdict(NamedTuple):
    """Whether each of the errors found is within what is allowed. NaN is not."""

    holds: bool
    found: list[float]
    allowed: list[float]


def tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, one or several."""
    return (result,) if isinstance(result, Tensor) else tuple(result)


def errors(result: Any, exact: Any) -> list[float]:
    """Relative errors of each tensor of the result: of the whole in the mean square, and of the worst element."""
    found = []
    for got, want in zip(tensors(result), tensors(exact), strict=True):
        assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
        difference = got.double() - want
        tiny = torch.finfo(torch.float64).tiny
        found.append((difference.norm() / want.norm().clamp(min=tiny)).item())
        found.append((difference.abs().max() / want.abs().max().clamp(min=tiny)).item())
    return found


def is_exact(result: Any, exact: Any) -> bool:
    """Whether a float64 result is the mathematics' own but for rounding. NaN is not."""
    return all(e < EXACT for e in errors(result, exact))


def pooled(results: Sequence[Any], exacts: Sequence[Any]) -> list[float]:
    """Root mean square of the errors over several draws of the same case."""
    rows = [errors(result, exact) for result, exact in zip(results, exacts, strict=True)]
    return [math.sqrt(math.fsum(e * e for e in column) / len(rows)) for column in zip(*rows, strict=True)]


def rounded(exact: Any, like: Any) -> tuple[Tensor, ...]:
    """The exact result in the dtypes of another."""
    return tuple(e.to(t.dtype) for e, t in zip(tensors(exact), tensors(like), strict=True))


def disturbed(value: Any, dtype: torch.dtype, terms: float, generator: torch.Generator) -> Any:
    """A floating tensor in float64, its elements off by what `terms` operations round; anything else as it is.

    The roundings are those of `dtype`, or of float32 where that is wider. An e4m3 tensor becomes float64, too.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    unit = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    noise = 2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1
    return value.double() * (1 + unit * math.sqrt(1 + terms / 4) * noise)


def judge(
    results: Sequence[Any],
    eagers: Sequence[Any],
    exacts: Sequence[Any],
    responses: Callable[[], Sequence[tuple[Any, Any]]] | None = None,
) -> Verdict:
    """The errors of results on several draws, in eager's dtypes, against the bound that the module derives.

    exacts: float64. responses: pairs (float64 mathematics of disturbed inputs, of the inputs themselves), asked for
    only where the results err more than twice as much as eager's and as the exact ones once rounded.
    """
    found = pooled(results, exacts)
    rounding = pooled([rounded(e, r) for e, r in zip(exacts, results, strict=True)], exacts)
    allowed = [FACTOR * max(pair) for pair in zip(pooled(eagers, exacts), rounding, strict=True)]
    if responses is not None and not _within(found, allowed):
        allowed = [max(pair) for pair in zip(allowed, arithmetic(rounding, responses()), strict=True)]
    return Verdict(_within(found, allowed), found, allowed)


def arithmetic(rounding: list[float], responses: Sequence[tuple[Any, Any]]) -> list[float]:
    """The bound from the arithmetic: of the roundings on the way and, independent of them, that of the result."""
    response = pooled(*zip(*responses, strict=True))
    return [FACTOR * math.hypot(*pair) for pair in zip(rounding, response, strict=True)]


def _within(found: list[float], allowed: list[float]) -> bool:
    return all(error <= bound for error, bound in zip(found, allowed, strict=True))
