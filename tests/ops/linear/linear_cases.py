"""Argument sets of the matmuls of tokens, with and without a LayerNorm before them, for `cases.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.draw import Draw

Arguments = dict[str, Any]


def row_moments(t: Tensor) -> Tensor:
    """[...,F] -> [...,2,ceil(F/32)]: mean and sum of squared deviations of each 32 features, in float32 or wider."""
    parts = t.to(torch.promote_types(t.dtype, torch.float32)).split(32, -1)
    means = [part.sum(-1) / part.shape[-1] for part in parts]
    squares = [((part - mean[..., None]) ** 2).sum(-1) for part, mean in zip(parts, means, strict=True)]
    return torch.stack([torch.stack(means, -1), torch.stack(squares, -1)], -2)


def _normed(arguments: Arguments, x: str, eps: float | None) -> Arguments:
    """The arguments with those of a LayerNorm of `x` before the matmul, unless eps is None."""
    if eps is None:
        return arguments
    sums = arguments["weight"].sum(1)
    return {**arguments, "row_moments": row_moments(arguments[x]), "weight_sums": sums, "eps": eps}


def _linear(
    rows: tuple[int, ...],
    k: int,
    o: int,
    *,
    bias: bool = True,
    residual: bool = False,
    gate: bool = False,
    k2: int = 0,
    activation: str = "none",
    eps: float | None = None,
) -> Callable[[Draw], Arguments]:
    features = o // 2 if activation == "geglu" else o

    def make(d: Draw) -> Arguments:
        arguments: Arguments = {
            "x": d.tokens(*rows, k),
            "weight": d.weight(o, k),
            "bias": d.normal(o) if bias else None,
            "residual": d.tokens(*rows, features) if residual else None,
            "gate": d.normal(features) if gate else None,
            "activation": activation,
            "x2": d.tokens(*rows, k2) if k2 else None,
            "weight2": d.weight(o, k2) if k2 else None,
        }
        return _normed(arguments, "x", eps)

    return make


def _unpatchify(
    n: int, c: int, h: int, w: int, p: int, width: int, *, bias: bool = True, eps: float | None = None
) -> Callable[[Draw], Arguments]:
    def make(d: Draw) -> Arguments:
        arguments: Arguments = {
            "t": d.tokens(n, h * w, width),
            "weight": d.weight(p * p * c, width),
            "bias": d.normal(p * p * c) if bias else None,
            "z": d.image(n, c, h * p, w * p),
            "patch_size": p,
        }
        return _normed(arguments, "t", eps)

    return make


def _patch_embed(n: int, c: int, h: int, w: int, p: int, width: int) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "z": d.image(n, c, h * p, w * p),
        "weight": d.weight(width, c, p, p),
        "table": d.normal(h * w, width),
    }


MAKERS: dict[str, dict[str, Callable[[Draw], Arguments]]] = {
    "linear": {
        "gate, residual": _linear((2, 7), 63, 48, residual=True, gate=True),
        "geglu": _linear((3, 5), 48, 60, activation="geglu", residual=True),
        "second input": _linear((2, 5), 48, 30, k2=63, residual=True),
        "gelu": _linear((2, 9), 48, 240, activation="gelu_tanh", gate=True),
        "no bias": _linear((2, 3), 240, 10, bias=False),
        "rows": _linear((17,), 10, 63),
        "one row": _linear((1, 1), 240, 3, activation="gelu_tanh"),
        "one vector": _linear((), 30, 45, residual=True),
        "everything": _linear((2, 3), 10, 90, k2=15, gate=True, residual=True, activation="geglu"),
        "normed": _linear((2, 7), 63, 48, gate=True, activation="gelu_tanh", eps=1e-6),
        "normed geglu": _linear((2, 5), 96, 60, activation="geglu", residual=True, eps=1e-5),
        "normed row": _linear((1, 1), 10, 3, bias=False, eps=0.5),
        "normed tiles": _linear((3, 19), 240, 70, eps=0.3),
        "normed wide": _linear((1, 3), 555, 3, eps=0.1),
    },
    "unpatchify_subtract": {
        "latent": _unpatchify(2, 16, 3, 5, 2, 48),
        "no bias": _unpatchify(1, 4, 4, 1, 2, 63, bias=False),
        "patches of 1": _unpatchify(3, 3, 2, 3, 1, 10),
        "normed": _unpatchify(2, 16, 3, 5, 2, 48, eps=1e-6),
        "normed, no bias": _unpatchify(1, 4, 3, 7, 2, 63, bias=False, eps=300.0),
        "patches of 3": _unpatchify(1, 3, 1, 2, 3, 30),
    },
    "patch_embed": {
        "latent": _patch_embed(2, 16, 3, 5, 2, 48),
        "one token": _patch_embed(1, 4, 1, 1, 2, 63),
        "patches of 1": _patch_embed(3, 3, 2, 3, 1, 10),
        "patches of 3": _patch_embed(1, 3, 1, 2, 3, 240),
    },
    "linear_row_moments": {
        "tiles": _linear((2, 19), 30, 240, residual=True),
        "one part": _linear((2, 3), 48, 10, gate=True),
        "ragged": _linear((3, 5), 10, 63, eps=0.3),
        "geglu": _linear((17,), 48, 90, activation="geglu"),
        "one vector": _linear((), 30, 45),
        "large mean": lambda d: {**_linear((2, 5), 30, 70)(d), "bias": d.normal(70) + 100},
    },
}
MAKERS["patch_embed_row_moments"] = MAKERS["patch_embed"]
