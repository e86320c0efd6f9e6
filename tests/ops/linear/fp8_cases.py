"""Argument sets of the fp8 operators: e4m3 tensors with the scales that a quantization would give them.

They stay e4m3 in every dtype under test. Depths are multiples of 32, as the operators require; the rest is awkward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests.ops.draw import Draw

if TYPE_CHECKING:
    from tests.ops.cases import Arguments

E4M3 = torch.float8_e4m3fn


def _quantized(v: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """v [...,D] as (e4m3 [...,D], scale [...,groups])."""
    parts = v.unflatten(-1, (groups, -1))
    scale = parts.abs().amax(-1) / 448
    return (parts / scale[..., None]).flatten(-2).to(torch.float32).to(E4M3), scale


def _linear(
    rows: tuple[int, ...],
    k: int,
    o: int,
    *,
    groups: int = 1,
    bias: bool = True,
    residual: bool = False,
    activation: str = "none",
) -> Callable[[Draw], Arguments]:
    def make(d: Draw) -> Arguments:
        x, x_scale = _quantized(d.tokens(*rows, k), groups)
        weight, weight_scale = _quantized(d.weight(o, k))
        given = {"x": x, "x_scale": x_scale, "weight": weight, "weight_scale": weight_scale[:, 0]}
        # "dtype" stands for whatever dtype is under test.
        given |= {"dtype": torch.float64, "bias": d.normal(o) if bias else None, "activation": activation}
        return given | ({"residual": d.tokens(*rows, o)} if residual else {})

    return make


def _rows(*shape: int, eps: float | None = None, zeros: bool = False) -> Callable[[Draw], Arguments]:
    def make(d: Draw) -> Arguments:
        x = d.tokens(*shape)
        if zeros:
            x[..., :1, :] = 0
        return {"x": x} if eps is None else {"x": x, "eps": eps}

    return make


MAKERS: dict[str, dict[str, Callable[[Draw], Arguments]]] = {
    "linear_fp8": {
        "residual": _linear((2, 7), 96, 48, residual=True),
        "groups of 64": _linear((2, 9), 192, 63, groups=3),
        "gelu": _linear((3, 5), 64, 240, activation="gelu_tanh"),
        "groups of 128": _linear((1, 33), 256, 30, groups=2, bias=False, residual=True),
        "groups of 96": _linear((5,), 192, 10, groups=2, activation="gelu_tanh", residual=True),
        "no bias": _linear((2, 3), 160, 10, bias=False),
        "one row": _linear((1, 1), 32, 3),
        "one vector": _linear((), 96, 45, residual=True),
    },
    "linear_fp8_quantized": {
        "gelu": _linear((2, 7), 96, 160, activation="gelu_tanh"),
        "groups of 128": _linear((2, 9), 64, 384, activation="gelu_tanh", bias=False),
        "groups of 64": _linear((19,), 192, 192, groups=3),
        "one vector": _linear((), 32, 32),
    },
    "quantize_rows": {
        "tokens": _rows(2, 7, 63),
        "rows": _rows(5, 240),
        "zeros": _rows(2, 3, 48, zeros=True),
        "one token": _rows(3, 1, 10),
        "one vector": _rows(30),
    },
    "layer_norm_quantize": {
        "tokens": _rows(2, 7, 63, eps=1e-6),
        "rows": _rows(5, 240, eps=1e-5),
        "zeros": _rows(2, 3, 48, eps=1e-6, zeros=True),
        "large eps": _rows(1, 3, 10, eps=5.0),
        "one vector": _rows(30, eps=1e-6),
    },
}
