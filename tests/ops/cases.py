"""Argument sets of every operator: awkward shapes and each option, the same for every implementation.

Sizes follow what pruning leaves: 3, 10, 48, 63 and 240 channels, groups of 10 to 45, odd and single-pixel images.
Values are random with a few outlier channels and offsets, so that a misplaced channel or a lost term shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.ops.conv.sepconv_cases import BLOCK_MAKERS
from tests.ops.draw import Draw
from tests.ops.linear import fp8_cases, linear_cases
from tests.ops.norm.norm_cases import norm_first, norm_makers
from tinysr_kernels.ops import REGISTRY

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an operator: `make` draws its arguments by name in float64 (or uint8)."""

    op: str
    name: str
    make: Callable[[Draw], Arguments]

    def arguments(self, dtype: torch.dtype, draw: int = 0) -> Arguments:
        """The arguments with every floating tensor, and an argument called dtype, in `dtype`."""
        drawn = self.make(Draw(f"{self.op} {self.name} {draw}"))
        schema = REGISTRY[self.op].overload()._schema
        optional = {a.name for a in schema.arguments if a.has_default_value()}
        given = {k: v for k, v in drawn.items() if v is not None or k not in optional}
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = {"row_moments": wide, "weight_sums": wide}  # as networks hold them
        return {k: dtype if k == "dtype" else convert(v, dtypes.get(k, dtype)) for k, v in given.items()}

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


def convert(value: Any, dtype: torch.dtype) -> Any:
    """A floating tensor in `dtype`, unless it is quantized; anything else as it is."""
    if not isinstance(value, Tensor) or value.dtype == fp8_cases.E4M3 or not value.is_floating_point():
        return value
    return value.to(dtype)


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
    stride, lost = options.get("stride", 1), 2 if options.get("one_sided") else 1
    out = (n, o, (h - lost) // stride + 1, (w - lost) // stride + 1)
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
    n: int, c: int, o: int, h: int, w: int, k: int, bias: bool = True, kind: Any = Draw.unit, **options: Any
) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "x": kind(d, n, c, h, w),
        "weight": d.weight(o, c, k, k),
        "bias": d.normal(o) if bias else None,
        **options,
    }


def _bytes(d: Draw, n: int, c: int, h: int, w: int) -> Tensor:
    """An image as files hold it."""
    return (d.unit(n, c, h, w) * 256).to(torch.uint8)


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


def _attention(n: int, t: int, heads: int, width: int, scale: float) -> Callable[[Draw], Arguments]:
    return lambda d: {"qkv": d.normal(n, t, 3 * heads * width), "heads": heads, "scale": scale}


def _cross_attention(n: int, t: int, context: int, heads: int, width: int, scale: float) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "q": d.normal(n, t, heads * width),
        "keys": d.normal(heads, context, width),
        "values": d.normal(heads, context, width),
        "scale": scale,
    }


def _joint_attention(
    n: int, t: int, context: int, heads: int, width: int, scale: float, *, shared: bool = False, queries: bool = True
) -> Callable[[Draw], Arguments]:
    return lambda d: {
        "image": d.normal(n, t, 3 * heads * width),
        "text": d.normal(1 if shared else n, context, (3 if queries else 2) * heads * width),
        "heads": heads,
        "scale": scale,
    }


def _attention_outliers(n: int, t: int, heads: int, width: int, scale: float) -> Callable[[Draw], Arguments]:
    return lambda d: {"qkv": d.tokens(n, t, 3 * heads * width), "heads": heads, "scale": scale}


def _resize(n: int, c: int, h: int, w: int, factor: int, **options: Any) -> Callable[[Draw], Arguments]:
    return lambda d: {"x": d.image(n, c, h, w), "factor": factor, **options}


def _resize_bytes(n: int, c: int, h: int, w: int, factor: int, **options: Any) -> Callable[[Draw], Arguments]:
    # "dtype" stands for whatever dtype is under test.
    return lambda d: {
        "x": _bytes(d, n, c, h, w),
        "factor": factor,
        "dtype": None if options.pop("no_dtype", False) else torch.float64,
        **options,
    }


def _adain(
    n: int, c: int, size: tuple[int, int], style: tuple[int, int], kind: Any = Draw.unit, **options: Any
) -> Callable[[Draw], Arguments]:
    """An image with overshoot and colors of its own."""
    return lambda d: {
        "x": d.unit(n, c, *size) * (0.5 + d.unit(c, 1, 1)) - 0.2,
        "style": kind(d, n, c, *style),
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
        "one-sided padding": _conv3x3(2, 10, 20, 6, 9, stride=2, one_sided=True),
        "shortcut alone": _conv3x3(
            1, 48, 63, 5, 3, shortcut=30, activation="relu", residual=True, activate_residual=False
        ),
        "normed, few results": norm_first(_conv3x3(2, 48, 3, 5, 7, residual=True), 4, eps=5.0),
        "few results of large images": _conv3x3(1, 10, 7, 9, 35, activation="silu"),
        "normed": norm_first(_conv3x3(2, 30, 20, 4, 5, stride=2, shortcut=3), 2),
        "normed, 64 channels": norm_first(_conv3x3(1, 64, 10, 3, 4, residual=True, activation="relu"), 64, eps=1.0),
    },
    "upsample_conv": {
        "relu": _upsample(2, 48, 30, 3, 5, activation="relu"),
        "silu": _upsample(1, 63, 10, 4, 3, activation="silu"),
        "one pixel": _upsample(1, 10, 3, 1, 1, bias=False),
        "one row": _upsample(3, 3, 48, 1, 7),
        "wide": _upsample(1, 240, 63, 2, 3),
        "64 channels": _upsample(2, 64, 24, 2, 2, activation="silu"),
    },
    **norm_makers(_conv3x3, _upsample),
    "input_conv": {
        "image": _input(2, 3, 48, 7, 5, 3),
        "unshuffle by 2": _input(1, 3, 45, 8, 10, 6, stride=2, padding=2, border=0.5),
        "unshuffle by 3": _input(2, 3, 10, 9, 6, 9, stride=3, padding=3, border=-1.0),
        "latent": _input(1, 16, 63, 5, 6, 3, bias=False, border=0.25),
        "no padding": _input(1, 10, 30, 3, 4, 3, padding=0),
        "one pixel": _input(3, 1, 10, 1, 1, 3, border=0.5),
        "stride 2, odd": _input(1, 3, 10, 7, 9, 3, stride=2, border=2.0),
        "bytes": _input(2, 3, 48, 5, 6, 3, border=0.25, kind=_bytes),
        "bytes, unshuffle by 2": _input(1, 3, 45, 8, 10, 6, stride=2, padding=2, border=0.5, kind=_bytes),
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
    "cross_attention": {
        "heads of 48": _cross_attention(2, 17, 21, 5, 48, 48**-0.5),
        "a prompt, heads of 64": _cross_attention(1, 33, 77, 1, 64, 64**-0.5),
        "one key, negative scale": _cross_attention(2, 5, 1, 2, 10, -0.3),
        "one query, one wide head": _cross_attention(3, 1, 20, 1, 150, 150**-0.5),
        "whole tiles, negative scale": _cross_attention(1, 40, 32, 2, 15, -0.4),
    },
    "joint_attention": {
        "heads of 48, a text per sample": _joint_attention(2, 17, 21, 2, 48, 48**-0.5),
        "a shared text, heads of 64": _joint_attention(2, 33, 37, 1, 64, 64**-0.5, shared=True),
        "no queries of the text": _joint_attention(2, 40, 19, 2, 20, 20**-0.5, queries=False),
        "whole tiles, negative scale": _joint_attention(1, 64, 32, 1, 15, -0.4),
        "one token each": _joint_attention(2, 1, 1, 1, 10, 0.3),
        "one wide head, shared keys": _joint_attention(2, 9, 5, 1, 150, 150**-0.5, shared=True, queries=False),
    },
    "tanh_scaled": {
        "latent": lambda d: {"z": d.normal(2, 16, 5, 7), "gain": 1 / 3},
        "outliers": lambda d: {"z": d.image(3, 48, 3, 4), "gain": 2.0},
        "one pixel": lambda d: {"z": d.normal(1, 3, 1, 1), "gain": 0.7},
        "small values": lambda d: {"z": d.normal(1, 10, 9, 5), "gain": 0.01},
        "negative gain": lambda d: {"z": d.normal(1, 63, 2, 6), "gain": -0.5},
    },
    "resize_bicubic": {
        "by 4": _resize(2, 3, 5, 7, 4),
        "bytes": _resize_bytes(2, 3, 4, 3, 4, mul=2 / 255, add=-1.0),
        "by 3, scaled": _resize(1, 10, 3, 4, 3, mul=0.5, add=0.5),
        "by 2, one row": _resize(3, 1, 1, 6, 2),
        "by 1": _resize(1, 3, 3, 2, 1, mul=-1.0),
        "one pixel": _resize(1, 48, 1, 1, 4, add=0.25),
        "as Pillow": _resize(2, 3, 5, 2, 4, pillow=True),
        "as Pillow, clamped": _resize(1, 3, 3, 4, 3, mul=1.2, add=-0.1, pillow=True, clamp=True),
        "one pixel as Pillow": _resize(1, 3, 1, 1, 2, pillow=True, clamp=True),
    },
    "adain_fix": {
        "image": lambda d: {"x": d.unit(2, 3, 9, 7), "style": d.unit(2, 3, 5, 4) * 0.5, "eps": 1e-5, "least": 0.0},
        "clamped": _adain(2, 3, (5, 7), (9, 6), eps=1e-5, least=0.0, clamp=True),
        "bytes of style": _adain(2, 3, (8, 12), (2, 3), kind=_bytes, eps=0.0, least=1 / 255),
        "many parts": _adain(1, 3, (17, 85), (5, 7), kind=_bytes, eps=0.0, least=1 / 255),
        "one pixel": _adain(3, 1, (1, 1), (1, 1), eps=0.0, least=1 / 255),
        "10 channels, one row": _adain(1, 10, (1, 37), (4, 1), eps=0.1, least=0.5),
        "flat": lambda d: {
            "x": 0.4 + d.unit(2, 3, 6, 5) * 1e-3,
            "style": d.unit(2, 3, 4, 4),
            "eps": 0.0,
            "least": 1 / 255,
        },
    },
    "wavelet_fix": {
        "image": lambda d: {"x": d.unit(2, 3, 8, 12), "style": d.unit(2, 3, 2, 3), "factor": 4},
        "overshoot": lambda d: {"x": d.unit(1, 3, 9, 15) * 2 - 0.5, "style": d.unit(1, 3, 3, 5), "factor": 3},
        "one row": lambda d: {"x": d.unit(1, 1, 1, 40), "style": d.unit(1, 1, 1, 40), "factor": 1},
        "one pixel": lambda d: {"x": d.unit(3, 10, 1, 1), "style": d.unit(3, 10, 1, 1), "factor": 1},
        "larger than the reach": lambda d: {"x": d.unit(1, 1, 40, 36), "style": _bytes(d, 1, 1, 10, 9), "factor": 4},
    },
    "clamp_image": {
        "image": lambda d: {"x": d.unit(2, 3, 5, 7) * 2 - 0.5},
        "one row": lambda d: {"x": d.unit(3, 1, 1, 70)},
        "one pixel": lambda d: {"x": d.image(1, 48, 1, 1)},
    },
}

# A convolution that leaves its moments is the same convolution; a few of its cases show the moments.
for _op in ("sepconv", "conv3x3"):
    _MAKERS[f"{_op}_moments"] = {name: _MAKERS[_op][name] for name in list(_MAKERS[_op])[:4]}

_MAKERS |= linear_cases.MAKERS | fp8_cases.MAKERS

CASES: dict[str, list[Case]] = {
    op: [Case(op, name, make) for name, make in makers.items()] for op, makers in _MAKERS.items()
}
