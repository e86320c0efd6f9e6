"""Arguments of convolutions with a GroupNorm before them or after them (`ops/conv/conv_norm.py`), for `cases.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Maker = Callable[..., Any]


def norm_first(make: Maker, groups: int, eps: float = 1e-5) -> Maker:
    """A convolution of the normalized image: per-channel statistics, which need not be the true ones, and the norm."""

    def drawn(d: Any) -> dict[str, Any]:
        found = make(d)
        n, c = found["x"].shape[:2]
        moments = torch.stack([d.normal(n, c), 0.2 + d.normal(n, c).square()], 1)
        weight, bias = d.normal(c), d.normal(c)
        norm = {"norm_moments": moments, "norm_weight": weight, "norm_bias": bias}
        return {**found, **norm, "norm_groups": groups, "norm_eps": eps}

    return drawn


def _then_norm(
    make: Maker,
    out: tuple[int, int, int, int],
    groups: int,
    *,
    second: int = 0,
    eps: float = 1e-5,
    silu: bool = True,
) -> Maker:
    """A convolution with a result of shape `out`, then a GroupNorm of that and `second` channels more."""
    n, o, h, w = out
    return lambda d: {
        **make(d),
        "normed_weight": d.normal(o + second),
        "normed_bias": d.normal(o + second),
        "normed_groups": groups,
        "normed_eps": eps,
        "normed_silu": silu,
        "normed_skip": d.image(n, second, h, w) if second else None,
    }


def norm_makers(conv3x3: Maker, upsample: Maker) -> dict[str, dict[str, Maker]]:
    """By operator and name; conv3x3 and upsample make the arguments of the convolutions alone."""
    return {
        "conv3x3_norm": {
            "groups of 15": _then_norm(
                conv3x3(2, 48, 60, 5, 7, residual=True, activation="relu"), (2, 60, 5, 7), 4, eps=5.0
            ),
            "groups of 4, no silu": _then_norm(conv3x3(1, 63, 48, 9, 7), (1, 48, 9, 7), 12, silu=False),
            "over the seam": _then_norm(
                conv3x3(2, 30, 45, 3, 5, shortcut=10, skip=3, residual=True), (2, 45, 3, 5), 2, second=15
            ),
            "groups of 8": _then_norm(conv3x3(3, 15, 24, 6, 6, bias=False), (3, 24, 6, 6), 3),
            "one pixel": _then_norm(conv3x3(1, 10, 3, 1, 1), (1, 3, 1, 1), 1, second=1),
            "norm before and after": _then_norm(norm_first(conv3x3(2, 16, 24, 4, 4), 2), (2, 24, 4, 4), 6),
            "stride 2": _then_norm(conv3x3(2, 64, 32, 7, 9, stride=2, activation="silu"), (2, 32, 4, 5), 8, silu=False),
        },
        "upsample_conv_norm": {
            "groups of 10": _then_norm(upsample(2, 48, 30, 3, 5), (2, 30, 6, 10), 3),
            "groups of 4": _then_norm(
                upsample(1, 64, 24, 2, 3, activation="relu"), (1, 24, 4, 6), 6, eps=5.0, silu=False
            ),
            "over the seam": _then_norm(upsample(3, 15, 10, 2, 1, bias=False), (3, 10, 4, 2), 3, second=5),
        },
    }
