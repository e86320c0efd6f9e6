"""attention against exponentials written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.cases import Arguments, Case
from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.ops.attention.attention import Attention

reference = reference_of("attention")


def oracle(qkv: Tensor, heads: int, scale: float) -> Tensor:
    features = qkv.shape[2] // 3
    width = features // heads
    out = []
    for head in range(heads):
        q, k, v = (qkv[:, :, i * features + head * width :][:, :, :width] for i in range(3))
        scores = scale * (q[:, :, None] * k[:, None]).sum(-1)
        powers = torch.exp(scores - scores.max(-1, keepdim=True).values)
        out.append((powers[..., None] * v[:, None]).sum(2) / powers.sum(-1, keepdim=True))
    return torch.cat(out, -1)


def eager(qkv: Tensor, heads: int, scale: float) -> Tensor:
    n, tokens, features = qkv.shape
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.tensor_split(3, 2))
    assert features == 3 * heads * q.shape[3]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).reshape(n, tokens, features // 3)


def thirds(qkv: Tensor, order: list[int]) -> Tensor:
    """The thirds of qkv in another order."""
    parts = qkv.tensor_split(3, 2)
    return torch.cat([parts[i] for i in order], 2)


def causal(qkv: Tensor, heads: int, scale: float) -> Tensor:
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.tensor_split(3, 2))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(2)


def heads_innermost(**a: Any) -> Tensor:
    out = reference(**a)
    return out.unflatten(2, (a["heads"], -1)).transpose(2, 3).flatten(2)


MUTANTS = {
    "keys and queries swapped": altered(reference, "qkv", lambda t: thirds(t, [1, 0, 2])),
    "keys and values swapped": altered(reference, "qkv", lambda t: thirds(t, [0, 2, 1])),
    "no scale": altered(reference, "scale", lambda _: 1.0),
    "one head": altered(reference, "heads", lambda _: 1),
    "causal": causal,
    "heads innermost": heads_innermost,
    "last token masked": lambda qkv, heads, scale: torch.cat(
        [reference(qkv[:, :-1], heads, scale), reference(qkv, heads, scale)[:, -1:]], 1
    ),
}

MISTAKES = [
    ({"qkv": torch.ones(17, 720)}, r"qkv must be \[N,T,3\*heads\*d\], found \[17, 720\]"),
    ({"qkv": torch.ones(2, 17, 721)}, r"qkv must be \[N,T,3\*5\*d\], found \[2, 17, 721\]"),
    ({"heads": 7}, r"qkv must be \[N,T,3\*7\*d\], found \[2, 17, 720\]"),
    ({"heads": 0}, "heads must be at least 1, found 0"),
]


class TestAttention(OperatorContract):
    op = "attention"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    channels_last = False
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES

    def terms(self, arguments: Arguments) -> float:
        """A score sums over a head's features, a result over the tokens."""
        _, tokens, features = arguments["qkv"].shape
        return 2 * (features // 3 // arguments["heads"] + tokens)

    def counted_flops(self, arguments: Arguments) -> int:
        """Two matmuls of T x T x d per head, and 5 per score for the softmax."""
        n, tokens, features = arguments["qkv"].shape
        heads = arguments["heads"]
        width = features // 3 // heads
        return n * heads * (2 * 2 * tokens * tokens * width + 5 * tokens * tokens)


def test_scores_beyond_exp_do_not_overflow() -> None:
    case = Case("attention", "beyond exp", lambda d: {"qkv": d.normal(1, 9, 30) * 100, "heads": 1, "scale": 1.0})
    TestAttention().check_as_good_as_eager(torch.ops.tinysr.attention, case, torch.float32)


def test_cost_by_hand() -> None:
    found = Attention(torch.empty(2, 17, 720, dtype=torch.float16, device="meta"), 5, 0.1).cost()
    assert found.flops == 2 * 5 * (4 * 289 * 48 + 5 * 289)
    assert found.bytes == 2 * (2 * 17 * 720 + 2 * 17 * 240)


@pytest.mark.parametrize(
    ("heads", "head_dim", "tokens", "arch", "block_m"),
    [
        (24, 64, 1024, 90, 64),  # 192 tiles of 128 queries would be two for most of 132 multiprocessors
        (24, 64, 1024, 80, 128),
        (5, 48, 4096, 90, 64),
        (10, 48, 1024, 90, 128),  # 80 tiles: one each
        (20, 48, 256, 90, 64),
    ],
)
def test_tiles_leave_no_multiprocessor_with_more_queries(
    heads: int, head_dim: int, tokens: int, arch: int, block_m: int
) -> None:
    qkv = torch.empty(1, tokens, 3 * heads * head_dim, dtype=torch.float16, device="meta")
    assert Attention(qkv, heads, 0.1).heuristic(GPUS[arch]).block_m == block_m
