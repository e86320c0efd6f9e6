"""Argument sets of separable convolutions that normalise their input, and of blocks of three, for `cases.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Maker = Callable[..., Any]


def normed_makers(sepconv: Maker, moments: Maker) -> dict[str, Maker]:
    """By name, from what makes a sepconv's other arguments, and the moments of channels."""

    def normed(n: int, c: int, *shape: int, groups: int, eps: float = 1e-5, **options: Any) -> Maker:
        make = sepconv(n, c, *shape, **options)
        return lambda d: {
            **make(d),
            "norm_moments": moments(d, n, c),
            "norm_weight": d.normal(c),
            "norm_bias": d.normal(c),
            "norm_groups": groups,
            "norm_eps": eps,
        }

    return {
        "normed, groups of 15": normed(2, 60, 48, 5, 7, groups=4, activation="relu", residual=True),
        "normed and enlarged": normed(2, 30, 10, 3, 4, groups=3, eps=1e-3, upsample=True),
        "normed, stride 2": normed(3, 48, 30, 7, 5, groups=16, stride=2),
        "normed, wide": normed(1, 240, 30, 3, 4, groups=8),
    }


def _block(n: int, c: int, h: int, w: int, bias: bool = True) -> Maker:
    def make(d: Any) -> dict[str, Any]:
        arguments = {"x": d.image(n, c, h, w)}
        for i in (1, 2, 3):
            arguments[f"depthwise{i}"] = d.normal(c, 3, 3) / 3
            arguments[f"pointwise{i}"] = d.weight(c, c)
            arguments[f"bias{i}"] = d.normal(c) if bias else None
        return arguments

    return make


BLOCK_MAKERS = {
    "48 channels": _block(2, 48, 9, 7),
    "10 channels, no bias": _block(1, 10, 11, 5, bias=False),
    "63 channels, one column": _block(3, 63, 8, 1),
    "wide, one row": _block(1, 144, 1, 9),
    "two rows": _block(1, 30, 2, 3),
    "one pixel": _block(2, 3, 1, 1),
}
