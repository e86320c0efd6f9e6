"""From a low-resolution image to the restored one, before the color fix: padding, windows, tiles, memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinysr_kernels.errors import InputError, OutOfMemory
from tinysr_kernels.nets import LatentNetwork, Network, PixelNetwork, resize
from tinysr_kernels.ops.trace import Call
from tinysr_kernels.runtime.device.host_memory import available_memory
from tinysr_kernels.runtime.tiling import (
    apply_with_halo,
    blend_windows,
    gaussian_window,
    pad_sides,
    pad_to,
    ramp_window,
)

BATCH_PIXELS = 1 << 20
"""Low-resolution pixels of a batch that run together; a larger batch runs in parts, with the same results."""
VAE_CORE = 128
"""Latent pixels per side that a tile of the tiny VAE adds to the result; with a halo of 20 it reads 168 a side, 1.72
times as many, and images of up to 168 latent pixels a side run whole."""
SMALLEST_CORE = 16
"""Below it tiles of the tiny VAE are not made smaller: the halo would be most of them."""
WINDOW_BATCH = 8
"""Windows of the transformer that run as one batch."""
TILE_BATCH = 8
"""Tiles of a UNet that run as one batch on a GPU, where memory allows."""
SMALLEST_TILE = 64
"""Low-resolution pixels per side below which tiles of a UNet are not made smaller."""
MEMORY_SHARE = 0.5
"""Share of the free memory that one network call may take."""
TILE_OVERLAP = 1 / 8
"""Share of a UNet tile's side that it has in common with its neighbor."""


@dataclass
class Limits:
    """How much of an image goes through the network at once. Kept by a model, and lowered where memory runs out.

    tile: low-resolution side of a UNet's tiles that was asked for, never changed; None takes the whole image while it
    fits into memory. pixels: low-resolution pixels of one call of a UNet, from the memory that was free at the first
    image and bytes_per_pixel, or None before it. batch_pixels: of the images that run together. tile_batch and
    window_batch: a UNet's tiles and a transformer's windows per batch. vae_core: see VAE_CORE.
    """

    tile: int | None = None
    pixels: int | None = None
    batch_pixels: int = BATCH_PIXELS
    tile_batch: int = 1
    window_batch: int = WINDOW_BATCH
    vae_core: int = VAE_CORE
    bytes_per_pixel: float = 0.0

    def images(self, pixels: int) -> int:
        """How many images of so many pixels run together."""
        most = self.batch_pixels if self.pixels is None else min(self.batch_pixels, self.pixels)
        return max(most // pixels, 1)

    def shrink(self, network: Network, shape: tuple[int, ...], device: torch.device) -> str:
        """After images [N,3,H,W] ran out of memory: lower what can be lowered, and say what.

        Images in a batch first, then tiles in a batch, then the tiles themselves. Raises OutOfMemory at the end of it.
        """
        n, _, height, width = shape
        if n > 1:
            self.batch_pixels = n // 2 * height * width
            return f"batches of {n // 2} images"
        if isinstance(network, LatentNetwork):
            return self._shrink_latents(network, device)
        return self._shrink_pixels(network, height, width, device)

    def _shrink_latents(self, network: LatentNetwork, device: torch.device) -> str:
        if self.window_batch > 1:
            self.window_batch //= 2
            return f"{self.window_batch} windows at once"
        if self.vae_core <= SMALLEST_CORE:
            side = (SMALLEST_CORE + 2 * network.halo) * network.factor
            raise OutOfMemory(
                f"a tile of {side}x{side} enlarged pixels does not fit on {device}, free: {_free(device)}; "
                "close other programs, or use device='cpu'"
            )
        self.vae_core = max(self.vae_core // 2, SMALLEST_CORE)
        side = (self.vae_core + 2 * network.halo) * network.factor
        return f"tiles of {side}x{side} enlarged pixels"

    def _shrink_pixels(self, network: PixelNetwork, height: int, width: int, device: torch.device) -> str:
        side = tile_side(height, width, device, self)
        if self.tile_batch > 1 and side < max(height, width):
            self.tile_batch //= 2
            return f"{self.tile_batch} tiles at once"
        if self.tile is not None or side <= SMALLEST_TILE:
            needed = side * side * self.bytes_per_pixel
            raise OutOfMemory(
                f"a tile of {side}x{side} pixels needs about {needed / 1e9:.2f} GB on {device}, "
                f"free: {_free(device)}; use a smaller tile, close other programs, or device='cpu'"
            )
        whole = side >= max(height, width)
        self.pixels = height * width // 2 if whole else _rung(side - 1) ** 2
        side = tile_side(height, width, device, self)
        return f"tiles of {side}x{side} pixels"


CallPart = Callable[[str, Tensor, bool], Tensor]
"""Runs a part of a network ("encoder", "transformer", "decoder" or "network") on a tensor of its device. The flag says
whether images of other sizes bring tensors of this shape too."""


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
    uint8 that has to be padded this dtype.
    """
    dtype = dtype or (lr.dtype if lr.is_floating_point() else torch.float32)
    away = next(network.buffers()).device
    run = call or (lambda name, x, _: part_of(network, name)(x))

    def visit(name: str, fixed: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: run(name, x.to(away), fixed).to(lr.device)

    if isinstance(network, PixelNetwork):
        return _restore_pixels(network, lr, limits, away, visit, dtype)
    return _restore_latents(network, lr, upscale, limits, visit, dtype)


Visit = Callable[[str, bool], Callable[[Tensor], Tensor]]


def check_upscale(network: Network, upscale: int) -> None:
    """Raise InputError when the network cannot enlarge by this factor."""
    if isinstance(network, PixelNetwork):
        if upscale != network.upscale:
            raise InputError(f"this checkpoint enlarges by {network.upscale}, found upscale={upscale}")
    elif not 1 <= upscale <= 16:
        raise InputError(f"upscale must be a whole number from 1 to 16, found {upscale}")


def in_one_piece(network: Network, height: int, width: int, upscale: int, limits: Limits) -> bool:
    """Whether images [N,3,H,W] run whole: no tiles of a UNet, none of a VAE."""
    if isinstance(network, PixelNetwork):
        sides = pad_sides(height, width, network.multiple, network.multiple)
        return tile_side(*sides, next(network.buffers()).device, limits) >= max(sides)
    sides = _latent_padding(network, height, width, upscale)
    return max(sides) * upscale // network.factor <= limits.vae_core + 2 * network.halo


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
        weights = _gaussian_window(side, z.device)
        z = blend_windows(z, (side, side), network.overlap, weights, 1, limits.window_batch, denoise).to(z.dtype)
    sr = apply_with_halo(z, core, halo, 1, factor, 1, visit("decoder", not whole))
    return sr[:, :, : height * upscale, : width * upscale]


def _padded(lr: Tensor, sides: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """lr [N,3,H,W] as it is if it has these sides, else extended to them, uint8 then in `dtype`."""
    if tuple(lr.shape[2:]) == sides:
        return lr
    # PyTorch pads bytes on the CPU alone; `resize` by 1 reads any layout in one launch.
    return pad_to(resize(lr, 1, dtype) if lr.dtype == torch.uint8 else lr, *sides)


@functools.cache
def _gaussian_window(side: int, device: torch.device) -> Tensor:
    """Made once: captured graphs read it, and making it would make the host wait for the device."""
    return gaussian_window(side, torch.float64, device)


@functools.lru_cache(maxsize=32)
def _ramp_window(height: int, width: int, overlap: int, device: torch.device) -> Tensor:
    return ramp_window(height, width, overlap, torch.float64, device)


def _restore_pixels(
    network: PixelNetwork, lr: Tensor, limits: Limits, away: torch.device, visit: Visit, dtype: torch.dtype
) -> Tensor:
    """The whole image while it fits, else overlapping tiles, blended."""
    height, width = lr.shape[2:]
    padded = _padded(lr, pad_sides(height, width, network.multiple, network.multiple), dtype)
    tile = tile_side(padded.shape[2], padded.shape[3], away, limits)
    side = max(tile // network.multiple, 1) * network.multiple
    window = (min(side, padded.shape[2]), min(side, padded.shape[3]))
    scale = network.upscale
    if window == tuple(padded.shape[2:]):
        sr = visit("network", False)(padded)
    else:
        overlap = min(max(round(side * TILE_OVERLAP), network.multiple), side // 2)
        weights = _ramp_window(window[0] * scale, window[1] * scale, overlap * scale, padded.device)
        batch = _tile_batch(side, limits)
        sr = blend_windows(padded, window, overlap, weights, scale, batch, visit("network", True))
    return sr[:, :, : height * scale, : width * scale]


def tile_side(height: int, width: int, device: torch.device, limits: Limits) -> int:
    """Side of a UNet's tiles for images [N,3,H,W] on the device: at least the longer side for one that runs whole.

    Tiles are 2^k or 3 * 2^k pixels, so that a little more or less free memory leaves them and their results alone.
    """
    if limits.tile is not None:
        return limits.tile
    if limits.pixels is None:
        free = free_memory(device)
        unlimited = free is None or limits.bytes_per_pixel == 0
        limits.pixels = 1 << 62 if unlimited else int((free or 0) * MEMORY_SHARE / limits.bytes_per_pixel)
    longest = max(height, width)
    if height * width <= limits.pixels:
        return longest
    return max(min(_rung(math.isqrt(limits.pixels)), longest), SMALLEST_TILE)


def _rung(side: int) -> int:
    """The largest 2^k or 3 * 2^k that is not above the side (at least 1)."""
    power = 1 << (max(side, 1).bit_length() - 1)
    return power * 3 // 2 if 2 * side >= 3 * power else power


def _tile_batch(side: int, limits: Limits) -> int:
    """Tiles that run at once: a power of two, within the batch's limit and the memory's."""
    fitting = limits.tile_batch if limits.pixels is None else min(limits.tile_batch, limits.pixels // side**2)
    return 1 << (max(fitting, 1).bit_length() - 1)


def _free(device: torch.device) -> str:
    free = free_memory(device)
    return "an unknown amount" if free is None else f"{free / 1e9:.2f} GB"


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a device, those that PyTorch keeps in reserve included; None where it cannot be told."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_memory()


def bytes_per_pixel(calls: list[Call], pixels: int) -> float:
    """An estimate of the memory one call of a network takes per low-resolution pixel, from its launches.

    Three times its largest operation: reference operators compute in float32 with intermediate results of their own,
    and skip connections stay alive beside them.
    """
    return 3 * max(call.cost.bytes for call in calls) / pixels
