"""From a low-resolution image to the restored one, before the colour fix: padding, windows, tiles, retries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinysr_kernels.errors import InputError, NonFiniteOutput, OutOfMemory
from tinysr_kernels.nets import LatentNetwork, Network, PixelNetwork
from tinysr_kernels.ops.trace import Call
from tinysr_kernels.runtime.host_memory import available_memory
from tinysr_kernels.runtime.notices import notice
from tinysr_kernels.runtime.tiling import (
    apply_with_halo,
    blend_windows,
    gaussian_window,
    pad_sides,
    pad_to,
    ramp_window,
)

ops = torch.ops.tinysr

VAE_CORE = 128
"""Latent pixels per side of the tiny VAE's tiles: with a halo of 19 the overhead is 1.68; smaller images run whole."""
WINDOW_BATCH = 8
"""Windows of the transformer that run as one batch."""
SMALLEST_TILE = 64
"""Low-resolution pixels per side below which tiles of a UNet are not made smaller."""
MEMORY_SHARE = 0.5
"""Share of the free memory that one network call may take."""
TILE_OVERLAP = 1 / 8
"""Share of a UNet tile's side that it has in common with its neighbour."""


@dataclass
class Limits:
    """How much of an image goes through the network at once.

    tile: low-resolution side of a UNet's tiles; None takes the whole image while it fits into memory, by the estimate
    of bytes_per_pixel. vae_core: latent side of the tiny VAE's tiles. window_batch: transformer windows per batch.
    """

    tile: int | None = None
    window_batch: int = WINDOW_BATCH
    vae_core: int = VAE_CORE
    bytes_per_pixel: float = 0.0


def restore(network: Network, lr: Tensor, upscale: int, limits: Limits, overlap: int) -> Tensor:
    """[N,3,H,W] in [0,1] of the network's dtype -> [N,3,s*H,s*W], in float32 or wider, not clamped, where lr lies.

    An image that lies on another device than the network (a large one in host memory) travels tile by tile, so that
    the memory taken on the network's device does not grow with it. overlap: latent pixels shared by neighbouring
    windows of a LatentNetwork. Raises OutOfMemory when the smallest tiles do not fit either.
    """
    if isinstance(network, PixelNetwork):
        return _restore_pixels(network, lr, limits)
    return _restore_latents(network, lr, upscale, limits, overlap)


def check_upscale(network: Network, upscale: int) -> None:
    """Raise InputError when the network cannot enlarge by this factor."""
    if isinstance(network, PixelNetwork):
        if upscale != network.upscale:
            raise InputError(f"this checkpoint enlarges by {network.upscale}, found upscale={upscale}")
    elif not 1 <= upscale <= 16:
        raise InputError(f"upscale must be a whole number from 1 to 16, found {upscale}")


def _restore_latents(network: LatentNetwork, lr: Tensor, upscale: int, limits: Limits, overlap: int) -> Tensor:
    """TinySR: the VAE's halves in exact tiles, the transformer in blended windows of its one size."""
    height, width = lr.shape[2:]
    multiple = network.factor // math.gcd(network.factor, upscale)
    minimum = -(-network.window * network.factor // upscale)
    padded = pad_to(lr, *pad_sides(height, width, multiple, minimum))
    enlarged = ops.resize_bicubic(padded, upscale)
    core, halo, factor = limits.vae_core, network.halo, network.factor
    encode, denoise, decode = (
        _visiting(part, lr.device) for part in (network.encoder, network.transformer, network.decoder)
    )
    z = apply_with_halo(enlarged, core, halo, factor, 1, encode)
    side = network.window
    if z.shape[2:] == (side, side):
        z = denoise(z)
    else:
        weights = gaussian_window(side, torch.float64, z.device)
        z = blend_windows(z, (side, side), overlap, weights, 1, limits.window_batch, denoise).to(z.dtype)
    sr = apply_with_halo(z, core, halo, 1, factor, decode)
    return sr[:, :, : height * upscale, : width * upscale].to(_wide(sr.dtype))


def _visiting(part: nn.Module, home: torch.device) -> Callable[[Tensor], Tensor]:
    """A part of the network as a function on tensors at `home`, which visit the part's device for the call."""
    away = next(part.buffers()).device
    if away == home:
        return part
    return lambda x: part(x.to(away)).to(home)


def _restore_pixels(network: PixelNetwork, lr: Tensor, limits: Limits) -> Tensor:
    """AdcSR and tinysr-unet: the whole image while it fits, else overlapping tiles, blended."""
    height, width = lr.shape[2:]
    padded = pad_to(lr, *pad_sides(height, width, network.multiple, network.multiple))
    device = next(network.buffers()).device
    tile = limits.tile or _largest_tile(padded, device, limits)
    while True:
        try:
            sr = _pixel_tiles(network, padded, tile)
            return sr[:, :, : height * network.upscale, : width * network.upscale]
        except (torch.OutOfMemoryError, MemoryError) as error:
            if limits.tile is not None or tile <= SMALLEST_TILE:
                raise _out_of_memory(tile, device, limits) from error
            tile = max(min(tile, max(padded.shape[2:])) // 2, SMALLEST_TILE)
            notice(f"out of memory: going on with tiles of {tile}x{tile} pixels")


def _pixel_tiles(network: PixelNetwork, padded: Tensor, tile: int) -> Tensor:
    side = max(tile // network.multiple, 1) * network.multiple
    window = (min(side, padded.shape[2]), min(side, padded.shape[3]))
    run = _visiting(network, padded.device)
    if window == tuple(padded.shape[2:]):
        sr = run(padded)
        return sr.to(_wide(sr.dtype))
    overlap = min(max(round(side * TILE_OVERLAP), network.multiple), side // 2)
    scale = network.upscale
    weights = ramp_window(window[0] * scale, window[1] * scale, overlap * scale, torch.float64, padded.device)
    return blend_windows(padded, window, overlap, weights, scale, 1, run)


def _largest_tile(padded: Tensor, device: torch.device, limits: Limits) -> int:
    """The larger side of the image if the image fits into memory, else the largest square tile that does."""
    free = free_memory(device)
    longest = max(padded.shape[2:])
    pixels = padded.shape[0] * padded.shape[2] * padded.shape[3]
    if free is None or pixels * limits.bytes_per_pixel <= free * MEMORY_SHARE:
        return longest
    side = math.isqrt(int(free * MEMORY_SHARE / limits.bytes_per_pixel))
    return max(min(side, longest), SMALLEST_TILE)


def _out_of_memory(tile: int, device: torch.device, limits: Limits) -> OutOfMemory:
    needed = tile * tile * limits.bytes_per_pixel
    free = free_memory(device)
    have = "an unknown amount" if free is None else f"{free / 1e9:.2f} GB"
    return OutOfMemory(
        f"a tile of {tile}x{tile} pixels needs about {needed / 1e9:.2f} GB on {device}, free: {have}; "
        "use a smaller tile, close other programs, or device='cpu'"
    )


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device, None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()


def bytes_per_pixel(calls: list[Call], pixels: int) -> float:
    """An estimate of the memory one call of a network takes per low-resolution pixel, from its launches.

    Three times its largest operation: reference operators compute in float32 with intermediate results of their own,
    and skip connections stay alive beside them.
    """
    return 3 * max(call.cost.bytes for call in calls) / pixels


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def finite_or_wider(
    run: Callable[[Network, Tensor], Tensor], networks: list[Callable[[], Network]], lr: Tensor
) -> tuple[Tensor, int]:
    """Run with the first network whose output is finite: (output, index of that network).

    networks: makers of the same network in wider and wider dtypes. Raises NonFiniteOutput after the last.
    """
    for i, make in enumerate(networks):
        network = make()
        dtype = next(network.buffers()).dtype
        out = run(network, lr.to(dtype))
        if bool(torch.isfinite(out).all()):
            return out, i
    raise NonFiniteOutput(
        "the network's output is not finite, even in the widest precision; check the checkpoint with `tinysr info`"
    )
