"""patch_embed against its docstring's sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.contract import OperatorContract, reference_of
from tests.ops.mathematics import altered, zeroed
from tests.ops.norm.row_moments import RowMomentsContract, by_hand, mutants
from tinysr_kernels.ops.linear.patch_embed import PatchEmbed

reference = reference_of("patch_embed")


def oracle(z: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    p = weight.shape[2]
    h, w = z.shape[2] // p, z.shape[3] // p
    tokens = []
    for y in range(h):
        for x in range(w):
            patch = z[:, None, :, y * p : (y + 1) * p, x * p : (x + 1) * p]
            tokens.append(table[y * w + x] + (patch * weight).sum((2, 3, 4)))
    return torch.stack(tokens, 1)


def eager(z: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    return F.conv2d(z, weight, stride=weight.shape[2]).flatten(2).transpose(1, 2) + table


MUTANTS = {
    "no table": altered(reference, "table", torch.zeros_like),
    "table shifted": altered(reference, "table", lambda t: t.roll(1, 0)),
    "patch transposed": altered(reference, "weight", lambda t: t.transpose(2, 3)),
    "dropped tap": altered(reference, "weight", lambda t: zeroed(t, ..., -1, -1)),
    "channels shifted": altered(reference, "weight", lambda t: t.roll(1, 1)),
    "tokens by column": altered(reference, "z", lambda t: t.flip(3)),
}

MISTAKES = [
    ({"z": torch.ones(16, 6, 10)}, r"z must be \[N,C,H,W\], found \[16, 6, 10\]"),
    ({"z": torch.ones(2, 16, 6, 9)}, "z must be a multiple of the patch size 2 per side, found 6x9"),
    ({"weight": torch.ones(48, 64)}, r"weight must be \[D,C,p,p\], found \[48, 64\]"),
    ({"weight": torch.ones(48, 4, 2, 2)}, r"weight must be \[48, 16, 2, 2\], found \[48, 4, 2, 2\]"),
    ({"weight": torch.ones(48, 16, 2, 1)}, r"weight must be \[48, 16, 2, 2\], found \[48, 16, 2, 1\]"),
    ({"table": torch.ones(1, 48)}, r"table must be \[15, 48\], found \[1, 48\]"),
]


class TestPatchEmbed(OperatorContract):
    op = "patch_embed"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    channels_last = False
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES


class TestPatchEmbedRowMoments(RowMomentsContract):
    op = "patch_embed_row_moments"
    oracle = staticmethod(by_hand(oracle))
    eager = staticmethod(by_hand(eager))
    mutants = mutants(reference_of("patch_embed_row_moments"))
    mistakes = MISTAKES[:1]


def test_cost_by_hand() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    z, weight, table = (torch.empty(s, **half) for s in [(2, 16, 6, 10), (48, 16, 2, 2), (15, 48)])
    found = PatchEmbed(z, weight, table).cost()
    assert found.flops == 2 * 30 * 64 * 48
    assert found.bytes == 2 * (1920 + 3072 + 720 + 1440)
