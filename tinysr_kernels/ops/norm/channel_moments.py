"""Moments of a convolution's result, for the GroupNorm that follows: `<operator>_moments` beside an operator.

    out     = operator(...)                                                [N,O,H,W]
    moments = mean and biased variance of every channel of out over H, W   [N,2,O], float32 or wider

The sums come from the tiles of the result while these are in registers, so that GroupNorm reads its input once. The
variance is never E[v^2] - mean^2, which cancels; parts are merged by Chan's rule (Chan, Golub, LeVeque, "Algorithms
for computing the sample variance", The American Statistician 37, 1983).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.beside import register_beside
from tinysr_kernels.ops.call import Cost, Operator
from tinysr_kernels.ops.layout import nbytes, nhwc
from tinysr_kernels.ops.norm.kernels import channel_moments as moments_kernel
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Operator as OldOperator

CACHED = 1 << 17
"""Numbers of a block of `of`: half a megabyte of float32."""


def of(out: Tensor) -> Tensor:
    """[N,O,H,W] -> [N,2,O]: mean and biased variance of every channel, in float32 or wider.

    On a CPU of blocks of pixels that stay in its cache, which takes a fifth of the time.
    """
    n, channels, _, _ = out.shape
    pixels = nhwc(out).permute(0, 2, 3, 1).reshape(n, -1, channels)
    block = max(CACHED // channels, 1) if out.device.type == "cpu" else pixels.shape[1]
    parts = [part.to(compute_dtype(out.dtype)) for part in pixels.split(block, 1)]
    means = torch.stack([part.mean(1) for part in parts], 1)
    squares = torch.stack([(part - part.mean(1, keepdim=True)).square_().sum(1) for part in parts], 1)
    counts = torch.tensor([part.shape[1] for part in parts], dtype=means.dtype, device=out.device)[:, None]
    mean = (means * counts).sum(1, keepdim=True) / pixels.shape[1]
    square = squares.sum(1) + ((means - mean).square() * counts).sum(1)
    return torch.stack([mean[:, 0], square / pixels.shape[1]], 1)


def scratch(out: Tensor, parts: int) -> Tensor:
    """Room for the moments of `parts` tiles of a result [N,O,H,W]."""
    return out.new_empty((out.shape[0], 3, out.shape[1], parts), dtype=torch.float32)


def merged(plan: Plan) -> Plan:
    """The plan of a convolution, with the moments of its result as a second result.

    Where its last launch leaves no `scratch_moments` (a library's kernel, a shared reduction), one more takes them.
    """
    if plan.launches[-1].arguments.get("scratch_moments") is None:
        plan = Plan(plan.result, (*plan.launches, take(plan.result)))
    parts = plan.launches[-1].arguments["scratch_moments"]
    n, _, channels, _ = parts.shape
    moments = parts.new_empty((n, 2, channels))
    return Plan((plan.result, moments), (*plan.launches, merge(parts, moments[:, 0], moments[:, 1])))


def merge(parts: Tensor, mean: Tensor, variance: Tensor) -> Launch:
    """Put `scratch_moments` [N,3,C,parts] together as mean and biased variance [N,C], both of the same strides."""
    n, _, channels, count = parts.shape
    arguments = {
        "scratch_moments": parts,
        "scratch_mean": mean,
        "scratch_variance": variance,
        "stride": mean.stride(0),
        "channels": channels,
        "parts": count,
        "PARTS": next_power_of_2(count, least=32, most=512),
    }
    return Launch(moments_kernel.merge, (channels, n), arguments, 4, 1)


def take(image: Tensor) -> Launch:
    """The moments of blocks of pixels of an image [N,C,H,W], channels_last, some 1024 numbers each."""
    n, outputs, h, w = image.shape
    block = next_power_of_2(outputs, most=64)
    pixels = 1024 // block
    arguments = {
        "out": image,
        "scratch_moments": scratch(image, cdiv(h * w, pixels)),
        "pixels": h * w,
        "outputs": outputs,
        "PIXELS": pixels,
        "OUTPUTS": block,
    }
    grid = (cdiv(h * w, pixels), cdiv(outputs, block), n)
    return Launch(moments_kernel.take, grid, arguments, 4, 1)


class ChannelMoments(Operator):
    """Mixin for a convolution: it also returns the channel statistics of its result. Goes before the convolution.

    The convolution's plan fills `scratch_moments` where it can, if the call is one of these.
    """

    __slots__ = ()
    returns = "(Tensor, Tensor)"

    def reference(self) -> Any:
        """The convolution's reference, and `of` its result."""
        out = super().reference()
        return out, of(out)

    def empty(self) -> Any:
        """The convolution's result, and [N,2,O] in float32 or wider."""
        out: Tensor = super().empty()
        return out, out.new_empty((out.shape[0], 2, out.shape[1]), dtype=compute_dtype(out.dtype))

    def cost(self) -> Cost:
        """The convolution's, 3 FLOPs per element of the result, and the bytes of the statistics."""
        least, (out, moments) = super().cost(), self.empty()
        return Cost(least.flops + 3 * out.numel(), least.bytes + nbytes(moments))

    def plan(self, config: Any) -> Plan:
        """The convolution's launches and one that merges the statistics of its tiles."""
        return merged(super().plan(config))


def _with_moments(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    @functools.wraps(plan)
    def both(config: Any, **arguments: Any) -> Plan:
        return plan(config, **arguments, moments=True)

    return both


def register_with_moments(
    operator: OldOperator,
    schema: str,
    operator_fake: Callable[..., Tensor],
    heuristic: Callable[..., Any] | None = None,
) -> OldOperator:
    """Register `<name>_moments(...) -> (out, moments)` beside an operator of this schema.

    heuristic: of the launch configurations, where the operator's own does not serve; it looks at the same arguments.

    The operator's kernels take `moments=True` in their plan.
    """
    own = operator.kernels
    assert own is not None
    # With its signature a look-up goes by the few arguments that count: by all of them it takes twice as long.
    chosen = own.heuristic if heuristic is None else functools.wraps(own.heuristic, assigned=())(heuristic)
    modules = (*own.modules, moments_kernel.__name__, __name__)
    kernels = dataclasses.replace(own, plan=_with_moments(own.plan), modules=modules, heuristic=chosen)

    def empty(out: Tensor) -> Tensor:
        return out.new_empty((out.shape[0], 2, out.shape[1]), dtype=compute_dtype(out.dtype))

    return register_beside(operator, schema, "moments", operator_fake, of, empty, kernels)
