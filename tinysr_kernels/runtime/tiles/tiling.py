"""Padding, windows and tiles: run networks with fixed or bounded input sizes on images of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.nets.windows import batched, window_starts


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


def ramp_window(height: int, width: int, overlap: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[height, width] weights that rise linearly over `overlap` pixels from each edge, positive everywhere."""

    def trapezoid(side: int) -> Tensor:
        index = torch.arange(side, dtype=torch.float64, device="cpu")
        distance = torch.minimum(index, side - 1 - index)
        return ((distance + 1) / (overlap + 1)).clamp(max=1)

    return torch.outer(trapezoid(height), trapezoid(width)).to(device, dtype)


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
