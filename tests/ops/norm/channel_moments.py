"""The contract of operators that also return per-channel statistics of their result (ops/norm/channel_moments.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import OperatorContract

Both = tuple[Tensor, Tensor]


def by_hand(function: Callable[..., Tensor]) -> Callable[..., Both]:
    """The result, and its channels' means and variances from sums over the pixels in float32 or wider."""

    def both(**arguments: Any) -> Both:
        out = function(**arguments)
        v = out.to(torch.promote_types(out.dtype, torch.float32)).flatten(2)
        mean = v.sum(2) / v.shape[2]
        return out, torch.stack([mean, ((v - mean[:, :, None]) ** 2).sum(2) / v.shape[2]], 1)

    return both


def mutants(reference: Callable[..., Both]) -> dict[str, Callable[..., Both]]:
    """Wrong statistics with a right result."""

    def wrong(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Both]:
        def both(**arguments: Any) -> Both:
            out, moments = reference(**arguments)
            return out, change(out, moments)

        return both

    return {
        "mean and variance swapped": wrong(lambda _, m: m.flip(1)),
        "the next channel's": wrong(lambda _, m: m.roll(1, 2)),
        "the next sample's": wrong(lambda _, m: m.roll(1, 0)),
        "unbiased variance": wrong(
            lambda out, m: m * torch.tensor([1.0, out[0, 0].numel() / max(out[0, 0].numel() - 1, 1)])[:, None]
        ),
        "standard deviation": wrong(lambda _, m: torch.stack([m[:, 0], m[:, 1].sqrt()], 1)),
        "no variance": wrong(lambda _, m: m * torch.tensor([1.0, 0.0])[:, None]),
    }


class MomentsContract(OperatorContract):
    """Inherit as Test<Operator>Moments and fill in the attributes."""

    same_bits_in_any_batch = False

    def result_dtypes(self, dtype: torch.dtype, number: int) -> list[torch.dtype]:
        return [dtype, torch.promote_types(dtype, torch.float32)]

    def counted_flops(self, arguments: Arguments) -> int:
        """The convolution's, and 3 for each element of the result."""
        out, _ = type(self).eager(**arguments)
        flops: int = super().counted_flops(arguments)
        return flops + 3 * out.numel()
