"""Padding, windows and tiles: how an image of any size meets networks that want particular ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Place = TypeVar("Place")


def pad_sides(height: int, width: int, multiple: int, minimum: int) -> tuple[int, int]:
    """(height, width) raised to the next multiple of `multiple` that is at least `minimum`."""
    return tuple(max(-(-side // multiple), -(-minimum // multiple)) * multiple for side in (height, width))  # type: ignore[return-value]


def pad_to(image: Tensor, height: int, width: int) -> Tensor:
    """Extend [N,C,H,W] at the right and the bottom: by reflection, by repeating the border where that is too short."""
    for axis, side in ((3, width), (2, height)):
        missing = side - image.shape[axis]
        if missing:
            padding = (0, missing, 0, 0) if axis == 3 else (0, 0, 0, missing)
            mode = "reflect" if missing < image.shape[axis] else "replicate"
            image = F.pad(image, padding, mode=mode)
    return image


def starts(length: int, window: int, overlap: int) -> list[int]:
    """Where windows begin so that they cover `length`: steps of window - overlap, the last pulled back to the end."""
    if length <= window:
        return [0]
    step = window - overlap
    count = math.ceil((length - window) / step) + 1
    return [min(i * step, length - window) for i in range(count)]


def gaussian_window(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[side, side] blending weights of TinySR's latent windows: g(y, side/2) g(x, (side-1)/2).

    g(i,m) = exp(-((i-m)/side)^2 / 0.02) / sqrt(0.02 pi); the two centres differ in the public script
    (TinySR test/test_tinysr.py), and so they do here.
    """
    index = torch.arange(side, dtype=torch.float64)

    def bell(middle: float) -> Tensor:
        return torch.exp(-(((index - middle) / side) ** 2) / 0.02) / math.sqrt(0.02 * math.pi)

    return torch.outer(bell(side / 2), bell((side - 1) / 2)).to(device, dtype)


def ramp_window(height: int, width: int, overlap: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[height, width] weights that rise linearly over `overlap` pixels from each edge, positive everywhere."""

    def trapezoid(side: int) -> Tensor:
        index = torch.arange(side, dtype=torch.float64)
        distance = torch.minimum(index, side - 1 - index)
        return ((distance + 1) / (overlap + 1)).clamp(max=1)

    return torch.outer(trapezoid(height), trapezoid(width)).to(device, dtype)


def batches(count: int, most: int) -> list[int]:
    """Sizes that add up to `count`: as many of `most` as fit, then powers of two, so that few sizes occur at all."""
    sizes = [most] * (count // most)
    rest = count % most
    while rest:
        sizes.append(1 << (rest.bit_length() - 1))
        rest -= sizes[-1]
    return sizes


def in_batches(places: Sequence[Place], most: int) -> Iterator[Sequence[Place]]:
    """The places in order, in groups of the sizes that `batches` gives."""
    begin = 0
    for size in batches(len(places), most):
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
    """Run `run` on overlapping windows of x and average the results by weight, in float32 or wider.

    x [N,C,H,W] at least as large as window (h,w); run maps [B,C,h,w] to [B,O,h*scale,w*scale], B up to `batch`
    windows at once, of one image or of several; weights [h*scale, w*scale]. Returns [N,O,H*scale,W*scale] in float32
    or wider.
    """
    n, _, height, width = x.shape
    h, w = window
    corners = [(y, x0) for y in starts(height, h, overlap) for x0 in starts(width, w, overlap)]
    total = norm = None
    for group in in_batches([(k, y, x0) for k in range(n) for y, x0 in corners], batch):
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
    """(from, to, read_from) of windows that all read core + 2 * halo pixels, or the whole length where that is less.

    What is kept of a window lies at least `halo` away from every edge of it that is not the image's own.
    """
    side = core + 2 * halo
    places = []
    begin = 0
    for read in starts(length, side, 2 * halo):
        end = length if read + side >= length else read + side - halo
        places.append((begin, end, read))
        begin = end
    return places


def apply_with_halo(
    x: Tensor, core: int, halo: int, unit_in: int, unit_out: int, batch: int, run: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a network without normalisation tile by tile, with the result it has on the whole.

    Coordinates are latent pixels: one is unit_in pixels of x and unit_out pixels of the result. Every tile is
    core + 2 * halo latent pixels a side (or the image's side), so that images of any size come in tiles of one shape;
    `batch` of them run at once. At the image's border the network's own padding applies.
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
    for group in in_batches(places, batch):
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
