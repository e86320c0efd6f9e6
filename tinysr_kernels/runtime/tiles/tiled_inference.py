"""From a low-resolution image to the restored one, before the color fix: padding, windows, tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tinysr_kernels.errors import InputError
from tinysr_kernels.nets import LatentNetwork, Network, PixelNetwork, resize
from tinysr_kernels.nets.windows import blend_windows, window_starts, window_weights
from tinysr_kernels.runtime.device.out_of_memory import is_out_of_memory
from tinysr_kernels.runtime.tiles.limits import Limits
from tinysr_kernels.runtime.tiles.tiling import apply_with_halo, halo_windows, pad_sides, pad_to, ramp_window

TILE_OVERLAP = 1 / 8
"""Share of a UNet tile's side that it has in common with its neighbor."""


CallPart = Callable[[str, Tensor, bool], Tensor]
"""Runs a part of a network ("encoder", "transformer", "decoder" or "network") on a tensor of its device. The flag says
whether images of other sizes bring tensors of this shape too."""


class PartOutOfMemory(MemoryError):
    """A part of the network ran out of memory: smaller tiles help, as they do not where the result does not fit."""


def part_of(network: Network, name: str) -> nn.Module:
    """The part of that name; "network" is all of it."""
    return network if name == "network" else network.get_submodule(name)


def restore(
    network: Network,
    lr: Tensor,
    upscale: int,
    limits: Limits,
    call: CallPart | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """[N,3,H,W] in [0,1] or uint8 -> [N,3,s*H,s*W], not clamped, where lr lies.

    The result is of the dtype that the network's parts give, or where windows were blended in float32 or wider.
    An image that lies on another device than the network (a large one in host memory) travels tile by tile, so that
    the memory taken on the network's device does not grow with it. call: runs a part, by default that of `network`.
    dtype: what a LatentNetwork receives, by default lr's own, or float32; a PixelNetwork receives what lr is, or of
    uint8 that has to be padded this dtype or float32 if that is wider. Raises PartOutOfMemory where a part runs out of
    memory.
    """
    dtype = dtype or (lr.dtype if lr.is_floating_point() else torch.float32)
    away = next(network.buffers()).device
    run = call or (lambda name, x, _: part_of(network, name)(x))

    def visit(name: str, fixed: bool) -> Callable[[Tensor], Tensor]:
        def of(x: Tensor) -> Tensor:
            try:
                return run(name, x.to(away), fixed).to(lr.device)
            except Exception as error:
                if is_out_of_memory(error):
                    raise PartOutOfMemory(str(error)) from error
                raise

        return of

    if isinstance(network, PixelNetwork):
        return _restore_pixels(network, lr, limits, visit, dtype)
    return _restore_latents(network, lr, upscale, limits, visit, dtype)


Visit = Callable[[str, bool], Callable[[Tensor], Tensor]]


def use_upscale(network: Network, upscale: int) -> None:
    """Let the network enlarge by this factor; InputError where it cannot."""
    if isinstance(network, PixelNetwork):
        if not network.set_upscale(upscale):
            raise InputError(f"this checkpoint enlarges by {network.upscale}, found upscale={upscale}")
    elif not 1 <= upscale <= 16:
        raise InputError(f"upscale must be a whole number from 1 to 16, found {upscale}")


def in_one_piece(network: Network, height: int, width: int, upscale: int, limits: Limits) -> bool:
    """Whether images [N,3,H,W] run whole: no tiles of a UNet, none of a VAE."""
    if isinstance(network, PixelNetwork):
        sides = pad_sides(height, width, network.multiple, network.least)
        return limits.tile_side(*sides) >= max(sides)
    return max(_latent_sides(network, height, width, upscale)) <= limits.vae_core + 2 * network.halo


def pieces(network: Network, height: int, width: int, upscale: int, limits: Limits) -> int:
    """How many calls of parts of the network one image takes, for progress: 1 in one piece, else tiles and windows."""
    if in_one_piece(network, height, width, upscale, limits):
        return 1
    if isinstance(network, PixelNetwork):
        sides = pad_sides(height, width, network.multiple, network.least)
        window, overlap = _tiles(network, sides, limits)
        return math.prod(len(window_starts(*each, overlap)) for each in zip(sides, window, strict=True))
    sides = _latent_sides(network, height, width, upscale)
    tiles = math.prod(len(halo_windows(side, limits.vae_core, network.halo)) for side in sides)
    return 2 * tiles + math.prod(len(window_starts(side, network.window, network.overlap)) for side in sides)


def _latent_sides(network: LatentNetwork, height: int, width: int, upscale: int) -> tuple[int, int]:
    padded = _latent_padding(network, height, width, upscale)
    return padded[0] * upscale // network.factor, padded[1] * upscale // network.factor


def _latent_padding(network: LatentNetwork, height: int, width: int, upscale: int) -> tuple[int, int]:
    multiple = network.factor // math.gcd(network.factor, upscale)
    minimum = -(-network.window * network.factor // upscale)
    return pad_sides(height, width, multiple, minimum)


def _restore_latents(
    network: LatentNetwork,
    lr: Tensor,
    upscale: int,
    limits: Limits,
    visit: Visit,
    dtype: torch.dtype,
) -> Tensor:
    """The VAE's halves in exact tiles, the transformer in blended windows of its one size."""
    height, width = lr.shape[2:]
    whole = in_one_piece(network, height, width, upscale, limits)
    padded = _padded(lr, _latent_padding(network, height, width, upscale), dtype)
    enlarged = resize(padded, upscale, dtype)
    core, halo, factor = limits.vae_core, network.halo, network.factor
    z = apply_with_halo(enlarged, core, halo, factor, 1, 1, visit("encoder", not whole))
    side = network.window
    denoise = visit("transformer", True)
    if z.shape[2:] == (side, side):
        z = denoise(z)
    else:
        weights = window_weights(side, z.device)
        z = blend_windows(z, (side, side), network.overlap, weights, 1, limits.window_batch, denoise).to(z.dtype)
    sr = apply_with_halo(z, core, halo, 1, factor, 1, visit("decoder", not whole))
    return sr[:, :, : height * upscale, : width * upscale]


def _padded(lr: Tensor, sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """lr [N,3,H,W] as it is if it has these sides, else extended to them, uint8 then in `dtype`."""
    if tuple(lr.shape[2:]) == sides:
        return lr
    # PyTorch pads bytes on the CPU alone; `resize` by 1 reads any layout in one launch.
    return pad_to(resize(lr, 1, dtype) if lr.dtype == torch.uint8 else lr, *sides)


@functools.lru_cache(maxsize=32)
def _ramp_window(height: int, width: int, overlap: int, device: torch.device) -> Tensor:
    return ramp_window(height, width, overlap, torch.float64, device)


def _restore_pixels(network: PixelNetwork, lr: Tensor, limits: Limits, visit: Visit, dtype: torch.dtype) -> Tensor:
    """The whole image within the limits, else overlapping tiles, blended."""
    height, width = lr.shape[2:]
    wide = torch.promote_types(dtype, torch.float32)  # the network rounds it itself
    padded = _padded(lr, pad_sides(height, width, network.multiple, network.least), wide)
    sides = (padded.shape[2], padded.shape[3])
    window, overlap = _tiles(network, sides, limits)
    scale = network.upscale
    if window == sides:
        sr = visit("network", False)(padded)
    else:
        weights = _ramp_window(window[0] * scale, window[1] * scale, overlap * scale, padded.device)
        batch = limits.tiles_together(max(window))
        sr = blend_windows(padded, window, overlap, weights, scale, batch, visit("network", True))
    return sr[:, :, : height * scale, : width * scale]


def _tiles(network: PixelNetwork, sides: tuple[int, int], limits: Limits) -> tuple[tuple[int, int], int]:
    """(height, width) of the tiles of an image of these padded sides, and what neighbors have in common."""
    side = max(limits.tile_side(*sides) // network.multiple * network.multiple, network.least)
    overlap = min(max(round(side * TILE_OVERLAP), network.multiple), side // 2)
    return (min(side, sides[0]), min(side, sides[1])), overlap
