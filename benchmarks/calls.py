"""The calls that the real networks make of each operator, on meta tensors: 128x128 -> 512x512, batch 1.

TinySR: a VAE of 64 channels at 512 to 64 pixels a side, a transformer of 1024 tokens of 1536. AdcSR: a UNet of 240, 480
and 960 channels at 64 to 8 pixels, a decoder of 256 to 64 channels at 64 to 512. tinysr-unet: separable
convolutions of any width, here AdcSR's and what further pruning leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


def _image(dtype: torch.dtype, channels: int, side: int) -> Tensor:
    shape = (1, channels, side, side)
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=torch.channels_last)


def _weight(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _sepconv(
    dtype: torch.dtype,
    channels: int,
    outputs: int,
    side: int,
    *,
    residual: bool = False,
    bias: bool = True,
    shortcut: int = 0,
    skip: int = 0,
    **options: Any,
) -> Arguments:
    out = side * (2 if options.get("upsample") else 1) // options.get("stride", 1)
    return {
        "x": _image(dtype, channels, side),
        "depthwise": _weight(dtype, channels, 3, 3),
        "pointwise": _weight(dtype, outputs, channels),
        "bias": _weight(dtype, outputs) if bias else None,
        "residual": _image(dtype, outputs, out) if residual else None,
        "shortcut": _image(dtype, shortcut, out) if shortcut else None,
        "skip": _image(dtype, skip, out) if skip else None,
        "shortcut_weight": _weight(dtype, outputs, shortcut + skip) if shortcut else None,
        **options,
    }


def sepconv(dtype: torch.dtype) -> Iterator[Arguments]:
    """TinySR's VAE, then the resnets of a separable UNet."""
    for side in (512, 256, 128, 64):
        yield _sepconv(dtype, 64, 64, side, activation="relu")
        yield _sepconv(dtype, 64, 64, side, activation="relu", residual=True)
    for side in (512, 256, 128):
        yield _sepconv(dtype, 64, 64, side, stride=2, bias=False)
        yield _sepconv(dtype, 64, 64, side // 2, upsample=True, bias=False)
    yield _sepconv(dtype, 64, 16, 64)
    yield _sepconv(dtype, 16, 64, 64, activation="relu")
    yield _sepconv(dtype, 64, 3, 512)
    for width, side in ((48, 128), (63, 64), (240, 64), (480, 32), (960, 16), (960, 8)):
        yield _sepconv(dtype, width, width, side)
        yield _sepconv(dtype, width, width, side, residual=True)
        yield _sepconv(dtype, width, width, side, shortcut=width, skip=width)
    yield _sepconv(dtype, 208, 112, 32, residual=True)
    yield _sepconv(dtype, 32, 24, 512, shortcut=32)
    yield _sepconv(dtype, 112, 112, 16, upsample=True)
    yield _sepconv(dtype, 240, 240, 64, stride=2)
    yield _sepconv(dtype, 480, 480, 16, upsample=True)


def _group_norm(dtype: torch.dtype, channels: int, skip: int, side: int, groups: int, silu: bool = True) -> Arguments:
    return {
        "x": _image(dtype, channels, side),
        "skip": _image(dtype, skip, side) if skip else None,
        "weight": _weight(dtype, channels + skip),
        "bias": _weight(dtype, channels + skip),
        "groups": groups,
        "eps": 1e-5,
        "silu": silu,
    }


def group_norm(dtype: torch.dtype) -> Iterator[Arguments]:
    """AdcSR's decoder, its UNet with and without a skip, and widths that pruning leaves."""
    for width, side in ((64, 512), (128, 512), (128, 256), (256, 128), (256, 64)):
        yield _group_norm(dtype, width, 0, side, 32)
    for width, skip, side, groups in ((240, 240, 64, 32), (480, 240, 64, 24), (480, 480, 32, 32), (960, 960, 8, 32)):
        yield _group_norm(dtype, width, skip, side, groups)
        yield _group_norm(dtype, width, 0, side, 24 if width == 240 else 32, silu=False)
    yield _group_norm(dtype, 24, 0, 512, 24)
    yield _group_norm(dtype, 63, 0, 256, 9)


def layer_norm(dtype: torch.dtype) -> Iterator[Arguments]:
    """The tokens of TinySR's transformer, then those of AdcSR's levels, then a row that no program holds."""
    for tokens, width in ((1024, 1536), (4096, 240), (1024, 480), (256, 960), (64, 960), (64, 5000)):
        yield {"x": _weight(dtype, 1, tokens, width), "eps": 1e-6}


CALLS: dict[str, Callable[[torch.dtype], Iterator[Arguments]]] = {
    "sepconv": sepconv,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
}
