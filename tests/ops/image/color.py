"""What the color fixes owe beyond every operator: flags as a second result, and images in bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.cases import CASES, Arguments
from tests.ops.contract import OperatorContract

Both = tuple[Tensor, Tensor]


def unit(style: Tensor, dtype: torch.dtype) -> Tensor:
    """An image in [0,1], of bytes too."""
    return style.to(dtype) / 255 if style.dtype == torch.uint8 else style


def flagged(out: Tensor, *shape: int) -> Both:
    """The result of an image that is finite."""
    return out, torch.ones(shape, dtype=torch.float64)


def change(function: Callable[..., Both], edit: Callable[[Tensor], Tensor]) -> Callable[..., Both]:
    """`function` with its image edited: a deliberate mistake."""

    def run(**arguments: Any) -> Both:
        out, finite = function(**arguments)
        return edit(out), finite

    return run


class ColorContract(OperatorContract):
    """What the color fixes have in common: flags as a second result, and images in bytes."""

    def result_dtypes(self, dtype: torch.dtype, number: int) -> list[torch.dtype]:
        return [dtype, torch.bool]

    def check_bytes(self, call: Callable[[Arguments], Any]) -> None:
        """Bytes are the nearest to the exact value, but where that is as near to the middle as float32 can err.

        Which is what the worst element of a float32 result may err (bounds.py).
        """
        for case in CASES[self.op]:
            arguments = case.arguments(torch.float32)
            exact = self.exact(case, torch.float32)[0]
            slack = self.allowed(case, torch.float32)[1] * exact.abs().max()
            found, finite = call({**arguments, "dtype": torch.uint8})
            assert found.dtype == torch.uint8
            assert (found.double() - 255 * exact).abs().max() <= 0.5 + 255 * slack
            assert finite.all()

    def check_flags(self, call: Callable[[Arguments], Any]) -> None:
        """A value that is not finite shows in its own sample, and row, wherever it stands."""
        cases = [case for case in CASES[self.op] if case.arguments(torch.float32)["x"].shape[0] > 1]
        for case in cases[:2]:
            arguments = case.arguments(torch.float16)
            x = arguments["x"]
            height, width = x.shape[2:]
            clean, flags = call(arguments)
            places = ((0, 0), (height // 2, width // 2), (height - 1, width - 1))
            for value, (row, column) in zip((float("inf"), float("nan"), -float("inf")), places, strict=True):
                wrong = x.clone()
                wrong[1, -1, row, column] = value
                out, finite = call({**arguments, "x": wrong})
                expected = torch.ones_like(flags)
                expected[(1, row)[: flags.dim()]] = False
                assert torch.equal(finite, expected), (value, row, column)
                assert torch.equal(out[0], clean[0])

    def test_bytes(self) -> None:
        self.check_bytes(self.call)

    def test_flags(self) -> None:
        self.check_flags(self.call)
