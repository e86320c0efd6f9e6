"""clamp_image against its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import reference_of
from tests.ops.image.color import Both, ColorContract, flagged
from tests.ops.mathematics import altered
from tinysr_kernels.ops.image.clamp_image import ClampImage

reference = reference_of("clamp_image")


def oracle(x: Tensor) -> Both:
    out = torch.minimum(torch.maximum(x, torch.zeros_like(x)), torch.ones_like(x))
    return flagged(out, x.shape[0], x.shape[2])


class TestClampImage(ColorContract):
    op = "clamp_image"
    oracle = staticmethod(oracle)
    eager = staticmethod(lambda x: flagged(x.clamp(0, 1), x.shape[0], x.shape[2]))
    mutants: Any = {
        "not clamped below": lambda x: flagged(x.clamp(max=1), x.shape[0], x.shape[2]),
        "not clamped above": lambda x: flagged(x.clamp(min=0), x.shape[0], x.shape[2]),
        "shifted": altered(reference, "x", lambda t: t.roll(1, 3)),
    }
    mistakes: Any = [
        ({"x": torch.ones(3, 5)}, r"x must be \[N,C,H,W\], found \[3, 5\]"),
        ({"dtype": torch.int64}, "dtype must be floating or torch.uint8, found torch.int64"),
    ]

    def counted_flops(self, arguments: Arguments) -> int:
        """None."""
        return 0


def test_cost_by_hand() -> None:
    found = ClampImage(torch.empty(2, 3, 4, 8, dtype=torch.float16, device="meta"), dtype=torch.uint8).cost()
    assert (found.flops, found.bytes) == (0, 2 * 192 + 192 + 8)
