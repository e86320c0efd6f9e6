"""Padding, windows and tiles: how an image of any size meets networks that want particular ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


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

    x [N,C,H,W] at least as large as window (h,w); run maps [B,C,h,w] to [B,O,h*scale,w*scale], up to `batch` windows
    at once; weights [h*scale, w*scale]. Returns [N,O,H*scale,W*scale] in float32 or wider.
    """
    n, _, height, width = x.shape
    h, w = window
    places = [(k, y, x0) for k in range(n) for y in starts(height, h, overlap) for x0 in starts(width, w, overlap)]
    total = norm = None
    for i in range(0, len(places), batch):
        group = places[i : i + batch]
        result = run(torch.cat([x[k : k + 1, :, y : y + h, x0 : x0 + w] for k, y, x0 in group]))
        if total is None or norm is None:
            wide = torch.promote_types(result.dtype, torch.float32)
            weights = weights.to(result.device, wide)
            shape = (n, result.shape[1], height * scale, width * scale)
            total = torch.zeros(shape, dtype=wide, device=result.device)
            norm = torch.zeros((n, 1, *shape[2:]), dtype=wide, device=result.device)
        for (k, y, x0), tile in zip(group, result, strict=True):
            area = (slice(y * scale, (y + h) * scale), slice(x0 * scale, (x0 + w) * scale))
            total[k, :, area[0], area[1]] += tile.to(total.dtype) * weights
            norm[k, :, area[0], area[1]] += weights
    assert total is not None
    assert norm is not None
    return total / norm


def halo_tiles(length: int, core: int, halo: int) -> Iterator[tuple[int, int, int, int]]:
    """(from, to, read_from, read_to) of tiles of `core` pixels whose reads reach `halo` further, within the length."""
    for begin in range(0, length, core):
        end = min(begin + core, length)
        yield begin, end, max(begin - halo, 0), min(end + halo, length)


def apply_with_halo(
    x: Tensor, core: int, halo: int, unit_in: int, unit_out: int, run: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a network without normalisation tile by tile, with the result it has on the whole.

    Coordinates are latent pixels: one is unit_in pixels of x and unit_out pixels of the result. Tiles of `core` latent
    pixels are read with `halo` more on each inner side; at the image's border the network's own padding applies.
    """
    n, _, height, width = x.shape
    rows, columns = height // unit_in, width // unit_in
    if rows <= core and columns <= core:
        return run(x)
    out: Tensor | None = None
    for y0, y1, ry0, ry1 in halo_tiles(rows, core, halo):
        for x0, x1, rx0, rx1 in halo_tiles(columns, core, halo):
            tile = run(x[:, :, ry0 * unit_in : ry1 * unit_in, rx0 * unit_in : rx1 * unit_in])
            if out is None:
                out = tile.new_empty((n, tile.shape[1], rows * unit_out, columns * unit_out))
            ty, tx = (y0 - ry0) * unit_out, (x0 - rx0) * unit_out
            th, tw = (y1 - y0) * unit_out, (x1 - x0) * unit_out
            out[:, :, y0 * unit_out : y1 * unit_out, x0 * unit_out : x1 * unit_out] = tile[
                :, :, ty : ty + th, tx : tx + tw
            ]
    assert out is not None
    return out
