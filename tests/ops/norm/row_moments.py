"""What an operator owes that also returns the statistics of its result's rows (ops/norm/row_moments.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import OperatorContract
from tests.ops.linear.linear_cases import row_moments

Both = tuple[Tensor, Tensor]


def by_hand(function: Callable[..., Tensor]) -> Callable[..., Both]:
    """The result, and the statistics of every 32 features of its rows."""

    def both(**arguments: Any) -> Both:
        out = function(**arguments)
        return out, row_moments(out)

    return both


def mutants(reference: Callable[..., Both]) -> dict[str, Callable[..., Both]]:
    """Wrong statistics with a right result."""

    def wrong(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Both]:
        def both(**arguments: Any) -> Both:
            out, moments = reference(**arguments)
            return out, change(out, moments)

        return both

    return {
        "mean and squares swapped": wrong(lambda _, m: m.flip(-2)),
        "the next part's": wrong(lambda _, m: m.roll(1, -1)),
        "the next row's": wrong(lambda _, m: m.flatten(0, -3).roll(1, 0).view(m.shape) if m.dim() > 2 else m),
        "variance": wrong(lambda _, m: m * torch.tensor([1.0, 1 / 32])[:, None]),
        "squares of the values": wrong(
            lambda out, m: torch.stack([m[..., 0, :], m[..., 1, :] + m[..., 0, :] ** 2], -2)
        ),
        "the last part counted as whole": wrong(
            lambda out, m: torch.cat([m[..., :-1], m[..., -1:] * ((out.shape[-1] - 1) % 32 + 1) / 32], -1)
        ),
    }


class RowMomentsContract(OperatorContract):
    """Inherit as Test<Operator>RowMoments and fill in the attributes."""

    channels_last = False
    same_bits_in_any_batch = False

    def result_dtypes(self, dtype: torch.dtype, number: int) -> list[torch.dtype]:
        return [dtype, torch.promote_types(dtype, torch.float32)]

    def counted_flops(self, arguments: Arguments) -> int:
        """The matmul's, and 3 per element of the result."""
        out, _ = type(self).eager(**arguments)
        flops: int = super().counted_flops(arguments)
        return flops + 3 * out.numel()
