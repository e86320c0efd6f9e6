"""Argument sets of blocks of three separable convolutions, for `cases.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Maker = Callable[..., Any]


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
