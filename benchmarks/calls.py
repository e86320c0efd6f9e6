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


CALLS: dict[str, Callable[[torch.dtype], Iterator[Arguments]]] = {"sepconv": sepconv}
