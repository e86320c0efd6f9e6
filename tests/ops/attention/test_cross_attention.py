"""cross_attention against exponentials written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments
from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered
from tinysr_kernels.ops.attention.cross_attention import CrossAttention

reference = reference_of("cross_attention")


def oracle(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    width = keys.shape[2]
    out = []
    for head in range(keys.shape[0]):
        own = q[:, :, head * width :][:, :, :width]
        scores = scale * (own[:, :, None] * keys[head]).sum(-1)
        powers = torch.exp(scores - scores.max(-1, keepdim=True).values)
        out.append((powers[..., None] * values[head]).sum(2) / powers.sum(-1, keepdim=True))
    return torch.cat(out, -1)


def eager(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    parts = q.unflatten(2, (keys.shape[0], -1)).transpose(1, 2)
    k, v = (t.expand(len(q), -1, -1, -1) for t in (keys, values))
    return F.scaled_dot_product_attention(parts, k, v, scale=scale).transpose(1, 2).flatten(2)


def heads_innermost(**a: Any) -> Tensor:
    return reference(**a).unflatten(2, (a["keys"].shape[0], -1)).transpose(2, 3).flatten(2)


class TestCrossAttention(OperatorContract):
    op = "cross_attention"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    channels_last = False
    same_bits_in_any_batch = False
    mutants = {
        "keys and values swapped": lambda q, keys, values, scale: reference(q, values, keys, scale),
        "no scale": altered(reference, "scale", lambda _: 1.0),
        "heads shifted": altered(reference, "keys", lambda t: t.roll(1, 0)),
        "heads innermost": heads_innermost,
        "last key left out": lambda q, keys, values, scale: reference(q, keys[:, :-1], values[:, :-1], scale),
        "values in another order": altered(reference, "values", lambda t: t.flip(1)),
    }
    mistakes = [
        ({"q": torch.ones(17, 240)}, r"q must be \[N,T,heads\*d\], found \[17, 240\]"),
        ({"q": torch.ones(2, 17, 241)}, r"q must be \[2, 17, 240\], found \[2, 17, 241\]"),
        ({"keys": torch.ones(7, 48)}, r"keys must be \[heads,S,d\], found \[7, 48\]"),
        ({"values": torch.ones(5, 8, 48)}, r"values must be \[5, 21, 48\], found \[5, 8, 48\]"),
    ]

    def terms(self, arguments: Arguments) -> float:
        """A score sums over a head's features, a result over the keys."""
        _, context, width = arguments["keys"].shape
        return 2 * (width + context)

    def counted_flops(self, arguments: Arguments) -> int:
        """Two matmuls of T x S x d per head, and 5 per score for the softmax."""
        heads, context, width = arguments["keys"].shape
        n, tokens, _ = arguments["q"].shape
        return n * heads * tokens * context * (4 * width + 5)


def test_a_context_needs_a_token() -> None:
    call = CrossAttention(torch.ones(1, 3, 8), torch.ones(2, 0, 4), torch.ones(2, 0, 4), 1.0)
    with pytest.raises(ValueError, match="one token at least"):
        call.check()


def test_cost_by_hand() -> None:
    shapes = ((2, 17, 240), (5, 7, 48), (5, 7, 48))
    q, keys, values = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in shapes)
    found = CrossAttention(q, keys, values, 0.1).cost()
    assert found.flops == 2 * 5 * 17 * 7 * (4 * 48 + 5)
    assert found.bytes == 2 * (2 * (2 * 17 * 240) + 2 * (5 * 7 * 48))
