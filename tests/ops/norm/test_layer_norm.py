"""layer_norm against sums over each row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered
from tinysr_kernels.ops.norm.layer_norm import LayerNorm

reference = reference_of("layer_norm")


def oracle(x: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    centered = x - x.sum(-1, keepdim=True) / width
    return centered / ((centered**2).sum(-1, keepdim=True) / width + eps).sqrt()


def eager(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


MUTANTS = {
    "no eps": altered(reference, "eps", lambda _: 0.0),
    "no mean": lambda x, eps: x / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt(),
    "unbiased variance": lambda x, eps: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + eps).sqrt(),
    "another dimension": lambda x, eps: reference(x.movedim(-1, 0).contiguous(), eps).movedim(0, -1),
    "last feature masked": lambda x, eps: torch.cat([reference(x[..., :-1], eps), x[..., -1:]], -1),
    "eps outside the root": lambda x, eps: reference(x, eps * eps),
}

MISTAKES = [({"x": torch.ones(())}, r"x must be \[...,D\], found \[\]")]


class TestLayerNorm(OperatorContract):
    op = "layer_norm"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    channels_last = False
    mutants = MUTANTS
    mistakes = MISTAKES

    def counted_flops(self, arguments: Arguments) -> int:
        """5 per element."""
        return 5 * arguments["x"].numel()


def test_cost_by_hand() -> None:
    found = LayerNorm(torch.empty(2, 7, 63, dtype=torch.bfloat16, device="meta"), 1e-6).cost()
    assert (found.flops, found.bytes) == (5 * 882, 2 * 2 * 882)
