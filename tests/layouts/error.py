"""How far a compiled checkpoint is from the reference pipeline of its layout."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

import tinysr_kernels


class Layout(Protocol):
    """A checkpoint that a test has written."""

    folder: Path

    def upscale(self, image: Tensor, color_fix: Any, factor: int) -> Tensor:
        """The reference pipeline's result."""


_layouts: dict[Path, Any] = {}


@functools.cache
def _expected(
    folder: Path, picture: Callable[[int, int], Tensor], size: tuple[int, int], color_fix: Any, factor: int
) -> Tensor:
    expected: Tensor = _layouts[folder].upscale(picture(*size), color_fix, factor)[0]
    return expected


def relative_error(
    layout: Layout,
    size: tuple[int, int],
    color_fix: Any = "none",
    factor: int = 4,
    dtype: str = "float32",
    change: Callable[[Any], None] = lambda model: None,
    *,
    picture: Callable[[int, int], Tensor],
) -> float:
    """Of a compiled model against the reference pipeline in float64, computed once. picture: float64, by its size."""
    _layouts[layout.folder] = layout
    expected = _expected(layout.folder, picture, size, color_fix, factor)
    model = tinysr_kernels.compile(layout.folder, dtype=dtype, upscale=factor, color_fix=color_fix)
    change(model)
    found = model(picture(*size)[0])
    return float((found - expected).norm() / expected.norm())
