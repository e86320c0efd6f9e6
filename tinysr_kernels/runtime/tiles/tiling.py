"""Padding, windows and tiles: run networks with fixed or bounded input sizes on images of any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Place = TypeVar("Place")


def pad_sides(height: int, width: int, multiple: int, minimum: int) -> tuple[int, int]:
    """(height, width) rounded up to a multiple of `multiple` that is at least `minimum`."""
    return tuple(max(-(-side // multiple), -(-minimum // multiple)) * multiple for side in (height, width))  # type: ignore[return-value]


def pad_to(image: Tensor, height: int, width: int) -> Tensor:
    """Pad [N,C,H,W] at the right and bottom by reflection, or by edge replication if the image is too small."""
    for axis, side in ((3, width), (2, height)):
        missing = side - image.shape[axis]
        if missing:
            padding = (0, missing, 0, 0) if axis == 3 else (0, 0, 0, missing)
            mode = "reflect" if missing < image.shape[axis] else "replicate"
            image = F.pad(image, padding, mode=mode)
    return image


def window_starts(length: int, window: int, overlap: int) -> list[int]:
    """Start positions of windows that cover `length`: a stride of window - overlap, the last aligned with the end."""
    if length <= window:
        return [0]
    step = window - overlap
    count = math.ceil((length - window) / step) + 1
    return [min(i * step, length - window) for i in range(count)]


def gaussian_window(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[side, side] blending weights of TinySR's latent windows: g(y, side/2) g(x, (side-1)/2).

    g(i,m) = exp(-((i-m)/side)^2 / 0.02) / sqrt(0.02 pi); the two centers differ as in the public script
    (TinySR test/test_tinysr.py).
    """
    index = torch.arange(side, dtype=torch.float64, device="cpu")

    def bell(middle: float) -> Tensor:
        return torch.exp(-(((index - middle) / side) ** 2) / 0.02) / math.sqrt(0.02 * math.pi)

    return torch.outer(bell(side / 2), bell((side - 1) / 2)).to(device, dtype)


def ramp_window(height: int, width: int, overlap: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[height, width] weights that rise linearly over `overlap` pixels from each edge, positive everywhere."""

    def trapezoid(side: int) -> Tensor:
        index = torch.arange(side, dtype=torch.float64, device="cpu")
        distance = torch.minimum(index, side - 1 - index)
        return ((distance + 1) / (overlap + 1)).clamp(max=1)

    return torch.outer(trapezoid(height), trapezoid(width)).to(device, dtype)


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


def halo_windows(length: int, core: int, halo: int) -> list[tuple[int, int, int]]:
    """(begin, end, read_begin) of windows that read core + 2 * halo pixels each, or the whole length if it is smaller.

    The kept range [begin, end) is at least `halo` pixels away from each edge of the window that is not an image edge.
    """
    side = core + 2 * halo
    places = []
    begin = 0
    for read in window_starts(length, side, 2 * halo):
        end = length if read + side >= length else read + side - halo
        places.append((begin, end, read))
        begin = end
    return places


def apply_with_halo(
    x: Tensor, core: int, halo: int, unit_in: int, unit_out: int, batch: int, run: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a network without normalization layers tile by tile, with the same result as on the whole image.

    x: [N,C,H,W]; returns [N,O,H*unit_out/unit_in,W*unit_out/unit_in] in the dtype that `run` returns. Coordinates are
    latent pixels: one corresponds to unit_in pixels of x and unit_out pixels of the result. Each tile has core + 2 *
    halo latent pixels per side (or the image's side if smaller), so that all sizes of images share one tile shape.
    batch: tiles per call of `run`. halo: at least the receptive field's radius. The network pads at image edges itself.
    """
    n, _, height, width = x.shape
    rows, columns = height // unit_in, width // unit_in
    side = core + 2 * halo
    if rows <= side and columns <= side:
        return run(x)
    h, w = min(side, rows), min(side, columns)
    across = halo_windows(columns, core, halo)
    places = [(k, y, x0) for k in range(n) for y in halo_windows(rows, core, halo) for x0 in across]
    out: Tensor | None = None
    for group in batched(places, batch):
        tiles = run(
            torch.cat(
                [
                    x[k : k + 1, :, y * unit_in : (y + h) * unit_in, x0 * unit_in : (x0 + w) * unit_in]
                    for k, (_, _, y), (_, _, x0) in group
                ]
            )
        )
        if out is None:
            shape = (n, tiles.shape[1], rows * unit_out, columns * unit_out)
            out = torch.empty(shape, dtype=tiles.dtype, device=tiles.device, memory_format=torch.channels_last)
        for (k, (top, bottom, y), (left, right, x0)), tile in zip(group, tiles, strict=True):
            kept = tile[:, (top - y) * unit_out : (bottom - y) * unit_out, (left - x0) * unit_out :]
            out[k, :, top * unit_out : bottom * unit_out, left * unit_out : right * unit_out] = kept[
                :, :, : (right - left) * unit_out
            ]
    assert out is not None
    return out
