"""Argument sets of every operator: awkward shapes and each option, the same for every implementation.

Sizes follow what pruning leaves: 3, 10, 48, 63 and 240 channels, groups of 10 to 45, odd and single-pixel images.
Values are random with a few outlier channels and offsets, so that a misplaced channel or a lost term shows.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.ops.sepconv_cases import BLOCK_MAKERS, normed_makers
from tinysr_kernels.ops import REGISTRY

Arguments = dict[str, Any]


class Draw:
    """Random float64 tensors from one seed."""

    def __init__(self, seed: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed values, the way biases and tables are."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale

    def weight(self, *shape: int) -> Tensor:
        """A weight [O, ...] scaled so that a sum over its inputs keeps their magnitude."""
        return self.normal(*shape) / math.prod(shape[1:]) ** 0.5

    def image(self, n: int, c: int, h: int, w: int, offset: float = 0.5) -> Tensor:
        """[N,C,H,W] with an offset per channel and, in one channel of sixteen, values 20 times as large."""
        scale = self.normal(c).abs() + 0.5
        scale[torch.randperm(c, generator=self.generator)[: max(1, c // 16)]] *= 20
        x = self.normal(n, c, h, w) * scale[:, None, None]
        return x + (self.normal(c) * offset * scale)[:, None, None]

    def tokens(self, *shape: int, offset: float = 0.5) -> Tensor:
        """[...,D] with outlier features, as `image`."""
        return self.image(math.prod(shape[:-1]), shape[-1], 1, 1, offset).reshape(shape)

    def unit(self, *shape: int) -> Tensor:
        """Uniform values in [0,1], the way images are."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """One call of an operator: `make` draws its arguments by name in float64 (or uint8)."""

    op: str
    name: str
    make: Callable[[Draw], Arguments]

    def arguments(self, dtype: torch.dtype, draw: int = 0) -> Arguments:
        """The arguments with every floating tensor, and an argument called dtype, in `dtype`."""
        drawn = self.make(Draw(f"{self.op} {self.name} {draw}"))
        schema = REGISTRY[self.op].overload._schema
        optional = {a.name for a in schema.arguments if a.has_default_value()}
        given = {k: v for k, v in drawn.items() if v is not None or k not in optional}
        return {k: dtype if k == "dtype" else convert(v, dtype) for k, v in given.items()}

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def convert(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in `dtype`; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _epilogue(
    d: Draw,
    n: int,
    o: int,
    h: int,
    w: int,
    *,
    bias: bool = True,
    residual: bool = False,
    shortcut: int = 0,
    skip: int = 0,
    **options: Any,
) -> Arguments:
    return {
        "bias": d.normal(o) if bias else None,
        "residual": d.image(n, o, h, w) if residual else None,
        "shortcut": d.image(n, shortcut, h, w) if shortcut else None,
        "skip": d.image(n, skip, h, w) if skip else None,
        "shortcut_weight": d.weight(o, shortcut + skip) if shortcut else None,
        **options,
    }


def _sepconv(n: int, c: int, o: int, h: int, w: int, **options: Any) -> Callable[[Draw], Arguments]:
    stride, enlarged = options.get("stride", 1), 2 if options.get("upsample") else 1
    out = (n, o, (h * enlarged - 1) // stride + 1, (w * enlarged - 1) // stride + 1)
    return lambda d: {
        "x": d.image(n, c, h, w),
        "depthwise": d.normal(c, 3, 3) / 3,
        "pointwise": d.weight(o, c),
        **_epilogue(d, *out, **options),
    }


def _conv3x3(n: int, c: int, o: int, h: int, w: int, **options: Any) -> Callable[[Draw], Arguments]:
    stride = options.get("stride", 1)
    out = (n, o, (h - 1) // stride + 1, (w - 1) // stride + 1)
    return lambda d: {
        "x": d.image(n, c, h, w),
        "weight": d.weight(o, c, 3, 3),
        **_epilogue(d, *out, **options),
    }


def _upsample(
    n: int, c: int, o: int, h: int, w: int, bias: bool = True, activation: str = "none"
) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "x": d.image(n, c, h, w),
        "phases": d.normal(4, o, c, 2, 2) / (4 * c) ** 0.5,
        "bias": d.normal(o) if bias else None,
        "activation": activation,
    }


def _input(
    n: int, c: int, o: int, h: int, w: int, k: int, bias: bool = True, **options: Any
) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "x": d.unit(n, c, h, w),
        "weight": d.weight(o, c, k, k),
        "bias": d.normal(o) if bias else None,
        **options,
    }


def _moments(d: Draw, n: int, c: int) -> Tensor:
    """Mean and variance of every channel, [N,2,C]."""
    return torch.stack([d.normal(n, c), 0.2 + d.normal(n, c).square()], 1)


def _group_norm(
    n: int,
    c1: int,
    c2: int,
    h: int,
    w: int,
    groups: int,
    *,
    eps: float = 1e-5,
    offset: float = 0.5,
    given: bool = False,
    **options: Any,
) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "x": d.image(n, c1, h, w, offset),
        "skip": d.image(n, c2, h, w, offset) if c2 else None,
        "weight": d.normal(c1 + c2),
        "bias": d.normal(c1 + c2),
        "groups": groups,
        "eps": eps,
        "moments": _moments(d, n, c1) if given else None,
        "skip_moments": _moments(d, n, c2) if given and c2 else None,
        **options,
    }


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
) -> Callable[[Draw], Arguments]:
    features = o // 2 if activation == "geglu" else o
    return lambda d: {
        "x": d.tokens(*rows, k),
        "weight": d.weight(o, k),
        "bias": d.normal(o) if bias else None,
        "residual": d.tokens(*rows, features) if residual else None,
        "gate": d.normal(features) if gate else None,
        "activation": activation,
        "x2": d.tokens(*rows, k2) if k2 else None,
        "weight2": d.weight(o, k2) if k2 else None,
    }


def _unpatchify(n: int, c: int, h: int, w: int, p: int, width: int, bias: bool = True) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "t": d.tokens(n, h * w, width),
        "weight": d.weight(p * p * c, width),
        "bias": d.normal(p * p * c) if bias else None,
        "z": d.image(n, c, h * p, w * p),
        "patch_size": p,
    }


def _patch_embed(n: int, c: int, h: int, w: int, p: int, width: int) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "z": d.image(n, c, h * p, w * p),
        "weight": d.weight(width, c, p, p),
        "table": d.normal(h * w, width),
    }


def _attention(n: int, t: int, heads: int, width: int, scale: float) -> Callable[[Draw], Arguments]:
    return lambda d: {"qkv": d.normal(n, t, 3 * heads * width), "heads": heads, "scale": scale}


def _attention_outliers(n: int, t: int, heads: int, width: int, scale: float) -> Callable[[Draw], Arguments]:
    return lambda d: {"qkv": d.tokens(n, t, 3 * heads * width), "heads": heads, "scale": scale}


def _resize(n: int, c: int, h: int, w: int, factor: int, **options: Any) -> Callable[[Draw], Arguments]:
    return lambda d: {"x": d.image(n, c, h, w), "factor": factor, **options}


def _resize_bytes(n: int, c: int, h: int, w: int, factor: int, **options: Any) -> Callable[[Draw], Arguments]:
    # "dtype" stands for whatever dtype is under test.
    return lambda d: {
        "x": (d.unit(n, c, h, w) * 256).to(torch.uint8),
        "factor": factor,
        "dtype": None if options.pop("no_dtype", False) else torch.float64,
        **options,
    }


_MAKERS: dict[str, dict[str, Callable[[Draw], Arguments]]] = {
    "sepconv": {
        "residual before relu": _sepconv(2, 48, 60, 5, 7, residual=True, activation="relu"),
        "residual after silu": _sepconv(1, 63, 48, 4, 3, residual=True, activation="silu", activate_residual=False),
        "shortcut and skip": _sepconv(2, 30, 45, 3, 5, shortcut=10, skip=3, residual=True, activation="silu"),
        "one pixel": _sepconv(1, 10, 3, 1, 1, bias=False),
        "one row": _sepconv(2, 48, 10, 1, 9, activation="relu"),
        "one column": _sepconv(1, 3, 10, 8, 1),
        "wide, batch 3": _sepconv(3, 240, 63, 3, 4, activation="silu"),
        "stride 2, odd": _sepconv(2, 10, 48, 7, 9, stride=2, activation="relu"),
        "stride 2, even": _sepconv(1, 45, 30, 6, 4, stride=2, residual=True),
        "stride 2, one pixel": _sepconv(1, 3, 3, 1, 1, stride=2),
        "enlarged": _sepconv(2, 30, 48, 3, 5, upsample=True, residual=True, activation="relu"),
        "enlarged pixel": _sepconv(1, 15, 10, 1, 1, upsample=True, bias=False),
        "shortcut alone": _sepconv(
            1, 48, 63, 5, 3, shortcut=30, activation="relu", residual=True, activate_residual=False
        ),
        **normed_makers(_sepconv, _moments),
    },
    "sepconv_block": BLOCK_MAKERS,
    "conv3x3": {
        "residual before relu": _conv3x3(2, 48, 60, 5, 7, residual=True, activation="relu"),
        "residual after silu": _conv3x3(1, 63, 48, 4, 3, residual=True, activation="silu", activate_residual=False),
        "shortcut and skip": _conv3x3(2, 30, 45, 3, 5, shortcut=10, skip=3, residual=True, activation="silu"),
        "one pixel": _conv3x3(1, 10, 3, 1, 1, bias=False),
        "one row": _conv3x3(2, 48, 10, 1, 9, activation="relu"),
        "one column": _conv3x3(1, 3, 10, 8, 1),
        "wide, batch 3": _conv3x3(3, 240, 10, 2, 3, activation="silu"),
        "64 channels": _conv3x3(1, 64, 24, 3, 4, residual=True),
        "stride 2, odd": _conv3x3(2, 10, 48, 7, 9, stride=2, activation="relu"),
        "stride 2, even": _conv3x3(1, 45, 30, 6, 4, stride=2, residual=True),
        "stride 2, one pixel": _conv3x3(1, 3, 3, 1, 1, stride=2),
        "shortcut alone": _conv3x3(
            1, 48, 63, 5, 3, shortcut=30, activation="relu", residual=True, activate_residual=False
        ),
    },
    "upsample_conv": {
        "relu": _upsample(2, 48, 30, 3, 5, activation="relu"),
        "silu": _upsample(1, 63, 10, 4, 3, activation="silu"),
        "one pixel": _upsample(1, 10, 3, 1, 1, bias=False),
        "one row": _upsample(3, 3, 48, 1, 7),
        "wide": _upsample(1, 240, 63, 2, 3),
        "64 channels": _upsample(2, 64, 24, 2, 2, activation="silu"),
    },
    "input_conv": {
        "image": _input(2, 3, 48, 7, 5, 3),
        "unshuffle by 2": _input(1, 3, 45, 8, 10, 6, stride=2, padding=2, border=0.5),
        "unshuffle by 3": _input(2, 3, 10, 9, 6, 9, stride=3, padding=3, border=-1.0),
        "latent": _input(1, 16, 63, 5, 6, 3, bias=False, border=0.25),
        "no padding": _input(1, 10, 30, 3, 4, 3, padding=0),
        "one pixel": _input(3, 1, 10, 1, 1, 3, border=0.5),
        "stride 2, odd": _input(1, 3, 10, 7, 9, 3, stride=2, border=2.0),
    },
    "group_norm": {
        "groups of 15": _group_norm(2, 60, 0, 5, 7, 4),
        "groups of 45 over the seam": _group_norm(1, 48, 42, 3, 5, 2),
        "groups of 10, no silu": _group_norm(3, 30, 0, 4, 1, 3, silu=False),
        "groups of 30 over the seam": _group_norm(2, 63, 177, 2, 3, 8, silu=False),
        "skip on a boundary": _group_norm(1, 10, 20, 3, 3, 3),
        "one pixel": _group_norm(1, 30, 0, 1, 1, 2),
        "groups of one, one pixel": _group_norm(1, 3, 0, 1, 1, 3, eps=1e-3),
        "one group": _group_norm(2, 3, 0, 5, 4, 1),
        "large eps": _group_norm(2, 48, 0, 3, 3, 4, eps=5.0, silu=False),
        "mean 50 deviations": _group_norm(1, 60, 0, 9, 11, 60, offset=50.0, silu=False),
        "moments given": _group_norm(2, 60, 0, 5, 7, 4, given=True),
        "moments given over the seam": _group_norm(2, 48, 42, 3, 5, 2, given=True, silu=False),
        "moments of groups of one": _group_norm(3, 10, 3, 3, 1, 13, given=True),
    },
    "layer_norm": {
        "tokens": lambda d: {"x": d.tokens(2, 7, 63), "eps": 1e-6},
        "rows": lambda d: {"x": d.tokens(5, 240), "eps": 1e-5},
        "one token": lambda d: {"x": d.tokens(3, 1, 48), "eps": 1e-5},
        "large eps": lambda d: {"x": d.tokens(1, 3, 10), "eps": 5.0},
        "large mean": lambda d: {"x": d.normal(2, 3, 240) + 50, "eps": 1e-6},
        "one vector": lambda d: {"x": d.tokens(30), "eps": 1e-6},
    },
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
    },
    "unpatchify_subtract": {
        "latent": _unpatchify(2, 16, 3, 5, 2, 48),
        "no bias": _unpatchify(1, 4, 4, 1, 2, 63, bias=False),
        "patches of 1": _unpatchify(3, 3, 2, 3, 1, 10),
        "patches of 3": _unpatchify(1, 3, 1, 2, 3, 30),
    },
    "patch_embed": {
        "latent": _patch_embed(2, 16, 3, 5, 2, 48),
        "one token": _patch_embed(1, 4, 1, 1, 2, 63),
        "patches of 1": _patch_embed(3, 3, 2, 3, 1, 10),
        "patches of 3": _patch_embed(1, 3, 1, 2, 3, 240),
    },
    "attention": {
        "heads of 48": _attention(2, 17, 5, 48, 48**-0.5),
        "heads of 64": _attention(1, 33, 2, 64, 64**-0.5),
        "one wide head": _attention(1, 9, 1, 240, 240**-0.5),
        "one token": _attention(3, 1, 3, 10, 0.3),
        "sharp": _attention(2, 20, 3, 15, 1.5),
        "one head of 256": _attention(2, 5, 1, 256, 256**-0.5),
        "whole tiles": _attention(1, 64, 1, 40, 40**-0.5),
        "tiles and a rest": _attention(1, 70, 2, 48, 48**-0.5),
        "negative scale": _attention(1, 37, 3, 10, -0.4),
        "outlier features": _attention_outliers(2, 33, 2, 48, 48**-0.5),
    },
    "resize_bicubic": {
        "by 4": _resize(2, 3, 5, 7, 4),
        "bytes": _resize_bytes(2, 3, 4, 3, 4, mul=2 / 255, add=-1.0),
        "by 3, scaled": _resize(1, 10, 3, 4, 3, mul=0.5, add=0.5),
        "by 2, one row": _resize(3, 1, 1, 6, 2),
        "by 1": _resize(1, 3, 3, 2, 1, mul=-1.0),
        "one pixel": _resize(1, 48, 1, 1, 4, add=0.25),
    },
    "channel_stats": {
        "image": lambda d: {"x": d.image(2, 3, 5, 7)},
        "latent": lambda d: {"x": d.image(3, 48, 1, 9)},
        "one pixel": lambda d: {"x": d.image(2, 10, 1, 1)},
        "large mean": lambda d: {"x": d.image(1, 3, 9, 6, offset=50.0)},
    },
    "affine_clamp": {
        "image": lambda d: {"x": d.unit(2, 3, 5, 7), "gain": d.unit(2, 3) * 2, "offset": d.normal(2, 3, scale=0.3)},
        "one pixel": lambda d: {"x": d.unit(3, 1, 1, 1), "gain": d.unit(3, 1), "offset": d.unit(3, 1) * 0.2},
        "many": lambda d: {"x": d.image(1, 10, 3, 4), "gain": d.normal(1, 10), "offset": d.normal(1, 10)},
    },
    "wavelet_fix": {
        "image": lambda d: {"x": d.unit(2, 3, 9, 13), "style": d.unit(2, 3, 9, 13)},
        "one row": lambda d: {"x": d.unit(1, 1, 1, 40), "style": d.unit(1, 1, 1, 40)},
        "one pixel": lambda d: {"x": d.unit(3, 10, 1, 1), "style": d.unit(3, 10, 1, 1)},
        "larger than the reach": lambda d: {"x": d.unit(1, 1, 37, 35), "style": d.unit(1, 1, 37, 35)},
    },
}

# A convolution that leaves its moments is the same convolution; a few of its cases show the moments.
for _op in ("sepconv", "conv3x3", "upsample_conv"):
    _MAKERS[f"{_op}_moments"] = {name: _MAKERS[_op][name] for name in list(_MAKERS[_op])[:4]}

CASES: dict[str, list[Case]] = {
    op: [Case(op, name, make) for name, make in makers.items()] for op, makers in _MAKERS.items()
}
