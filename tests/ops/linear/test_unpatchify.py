"""unpatchify_subtract against a loop over the pixels of the latent."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.contract import OperatorContract, reference_of
from tests.ops.linear.test_linear import matmul, normalized, normed_matmul
from tests.ops.mathematics import altered, zeroed
from tinysr_kernels.ops.linear.unpatchify import UnpatchifySubtract

reference = reference_of("unpatchify_subtract")


def oracle(
    t: Tensor,
    weight: Tensor,
    z: Tensor,
    patch_size: int,
    bias: Tensor | None = None,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    v = matmul(t, weight) if row_moments is None else normed_matmul(t, weight, row_moments, weight_sums, eps)
    if bias is not None:
        v = v + bias
    p, out = patch_size, z.clone()
    _, channels, height, width = z.shape
    for c in range(channels):
        for row in range(height):
            for column in range(width):
                token = row // p * (width // p) + column // p
                out[:, c, row, column] -= v[:, token, (row % p * p + column % p) * channels + c]
    return out


def eager(
    t: Tensor,
    weight: Tensor,
    z: Tensor,
    patch_size: int,
    bias: Tensor | None = None,
    row_moments: Tensor | None = None,
    weight_sums: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    n, c, h, w = z.shape
    p = patch_size
    v = F.linear(normalized(t, row_moments, eps), weight, bias).view(n, h // p, w // p, p, p, c)
    return z - torch.einsum("nhwpqc->nchpwq", v).reshape(n, c, h, w)


def reordered(order: str) -> Any:
    """A wrong order of the projection's features, stated for (p, q, c)."""

    def edit(**a: Any) -> Tensor:
        p, c = a["patch_size"], a["z"].shape[1]
        feature = torch.einsum(f"pqc->{order}", torch.arange(p * p * c).view(p, p, c)).reshape(-1)
        moved = {k: a[k][feature] for k in ("weight", "bias") if a[k] is not None}
        return reference(**{**a, **moved})

    return edit


MUTANTS = {
    "added": lambda **a: 2 * a["z"] - reference(**a),
    "no bias": altered(reference, "bias", torch.zeros_like),
    "rows and columns of a patch swapped": reordered("qpc"),
    "channels first": reordered("cpq"),
    "tokens by column": lambda **a: reference(**{**a, "t": a["t"].roll(1, 1)}),
    "no mean": altered(reference, "weight_sums", torch.zeros_like),
    "no eps": altered(reference, "eps", lambda _: 0.0),
    "features masked": altered(reference, "weight", lambda t: zeroed(t, slice(None), -1)),
}

MISTAKES = [
    ({"z": torch.ones(16, 6, 10)}, r"z must be \[N,C,H,W\], found \[16, 6, 10\]"),
    ({"z": torch.ones(2, 16, 5, 10)}, "z must be a multiple of the patch size 2 per side, found 5x10"),
    ({"patch_size": 0}, "patch_size must be at least 1, found 0"),
    ({"t": torch.ones(30, 48)}, r"t must be \[N,T,D\], found \[30, 48\]"),
    ({"t": torch.ones(2, 14, 48)}, r"t must be \[2, 15, 48\], found \[2, 14, 48\]"),
    ({"weight": torch.ones(64, 47)}, r"weight must be \[64, 48\], found \[64, 47\]"),
    ({"bias": torch.ones(16)}, r"bias must be \[64\], found \[16\]"),
    ({"weight_sums": torch.ones(64)}, "row_moments and weight_sums must be given together"),
]


class TestUnpatchifySubtract(OperatorContract):
    op = "unpatchify_subtract"
    oracle = staticmethod(oracle)
    eager = staticmethod(eager)
    same_bits_in_any_batch = False
    mutants = MUTANTS
    mistakes = MISTAKES


def test_cost_by_hand() -> None:
    half = {"dtype": torch.float16, "device": "meta"}
    t, weight, z = (torch.empty(s, **half) for s in [(2, 15, 48), (64, 48), (2, 16, 6, 10)])
    found = UnpatchifySubtract(t, weight, None, z, 2).cost()
    assert found.flops == 2 * 30 * 64 * 48
    assert found.bytes == 2 * (1440 + 3072 + 1920 + 1920)
