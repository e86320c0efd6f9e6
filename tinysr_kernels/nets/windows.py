"""A network of bounded size on latents of any size: windows that overlap, and the average of what they give."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from tinysr_kernels.ops.trace import unrecorded

Place = TypeVar("Place")


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Start positions of windows that cover `length`: a stride of window - overlap, the last aligned with the end."""
    if length <= window:
        return [0]
    step = window - overlap
    count = math.ceil((length - window) / step) + 1
    return [min(i * step, length - window) for i in range(count)]


def gaussian_window(side: int, dtype: torch.dtype, device: torch.device, symmetric: bool = False) -> Tensor:
    """[side, side] blending weights of latent windows: g(y, side/2) g(x, (side-1)/2).

    g(i,m) = exp(-((i-m)/side)^2 / 0.02) / sqrt(0.02 pi); the two centers differ as in the public scripts
    (TinySR test/test_tinysr.py, OSEDiff osediff.py). symmetric: both are (side-1)/2 (PiSA-SR pisasr.py).
    """
    index = torch.arange(side, dtype=torch.float64, device="cpu")

    def bell(middle: float) -> Tensor:
        return torch.exp(-(((index - middle) / side) ** 2) / 0.02) / math.sqrt(0.02 * math.pi)

    return torch.outer(bell((side - symmetric) / 2), bell((side - 1) / 2)).to(device, dtype)


@functools.cache
def window_weights(side: int, device: torch.device, symmetric: bool = False) -> Tensor:
    """`gaussian_window`, made once: captured graphs read it, and making it would stop the host.

    Not recorded (`ops/trace.py`): it is no part of an image's work.
    """
    with unrecorded():
        return gaussian_window(side, torch.float64, device, symmetric)


def batch_sizes(count: int, most: int) -> list[int]:
    """Batch sizes that sum to `count`: `most` while possible, then powers of two, to limit the distinct sizes."""
    sizes = [most] * (count // most)
    rest = count % most
    while rest:
        sizes.append(1 << (rest.bit_length() - 1))
        rest -= sizes[-1]
    return sizes


def batched(places: Sequence[Place], most: int) -> Iterator[Sequence[Place]]:
    """Split the places, in order, into batches of the sizes of `batch_sizes`."""
    begin = 0
    for size in batch_sizes(len(places), most):
        yield places[begin : begin + size]
        begin += size


def blend_windows(
    x: Tensor,
    window: tuple[int, int],
    overlap: int,
    weights: Tensor,
    scale: int,
    batch: int,
    run: Callable[[Tensor], Tensor],
) -> Tensor:
    """Apply `run` to overlapping windows of x and return the weighted average of the results.

    x: [N,C,H,W], at least as large as window (h,w). run: maps [B,C,h,w] to [B,O,h*scale,w*scale]. batch: the maximum of
    B; a batch may contain windows of several images. weights: [h*scale,w*scale]. Returns [N,O,H*scale,W*scale] in
    float32 or wider.
    """
    n, _, height, width = x.shape
    h, w = window
    corners = [(y, x0) for y in window_starts(height, h, overlap) for x0 in window_starts(width, w, overlap)]
    total = norm = None
    for group in batched([(k, y, x0) for k in range(n) for y, x0 in corners], batch):
        result = run(torch.cat([x[k : k + 1, :, y : y + h, x0 : x0 + w] for k, y, x0 in group]))
        if total is None or norm is None:
            wide = torch.promote_types(result.dtype, torch.float32)
            weights = weights.to(result.device, wide)
            shape = (n, result.shape[1], height * scale, width * scale)
            total = torch.zeros(shape, dtype=wide, device=result.device)
            norm = torch.zeros((1, 1, *shape[2:]), dtype=wide, device=result.device)
        for (k, y, x0), tile in zip(group, result, strict=True):
            area = (slice(y * scale, (y + h) * scale), slice(x0 * scale, (x0 + w) * scale))
            total[k, :, area[0], area[1]] += tile.to(total.dtype) * weights
            if k == 0:
                norm[0, :, area[0], area[1]] += weights
    assert total is not None
    assert norm is not None
    return total / norm
