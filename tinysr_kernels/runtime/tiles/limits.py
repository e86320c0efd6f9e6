"""How much of an image goes through a network at once: fixed when a model is compiled, lowered only for one call.

What runs, and so every bit of a result, follows from the image, the model and these limits; never from the memory that
happens to be free. A call that runs out of memory goes on with smaller limits of its own and says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from tinysr_kernels.errors import OutOfMemory
from tinysr_kernels.nets import LatentNetwork, Network, PixelNetwork
from tinysr_kernels.ops.trace import Call
from tinysr_kernels.runtime.device.host_memory import total_memory
from tinysr_kernels.runtime.device.out_of_memory import shortage

BATCH_PIXELS = 1 << 20
"""Low-resolution pixels of a batch that run together; a larger batch runs in parts, with the same results."""
BATCH_IMAGES = 1024
"""Images that run together, however small: kernels with a program per sample in the second or third dimension of their
grid have 65535 programs there, several a sample in some."""
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
GPU_SHARE = 1 / 2
"""Share of a GPU's memory class that one call of a UNet may take by the estimate of `bytes_per_pixel`."""
HOST_SHARE = 1 / 4
"""The same of host memory, of which other programs use more, and where Linux kills who takes too much."""
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class Limits:
    """How much of an image goes through the network at once.

    tile: low-resolution side of a UNet's tiles that was asked for, never changed; None takes the whole image up to
    `pixels`. pixels: low-resolution pixels of one call of a UNet. batch_pixels: of the images that run together.
    tile_batch and window_batch: a UNet's tiles and a transformer's windows per batch. vae_core: see VAE_CORE.
    """

    tile: int | None = None
    pixels: int = UNLIMITED
    batch_pixels: int = BATCH_PIXELS
    tile_batch: int = 1
    window_batch: int = WINDOW_BATCH
    vae_core: int = VAE_CORE

    @classmethod
    def of(
        cls, network: Network, launches: list[Call], traced_pixels: int, device: torch.device, backend: str,
        tile: int | None,
    ) -> Limits:  # fmt: skip
        """The limits of a model. launches: of one image of `traced_pixels`.

        Only the kernels compute the same bits for an image alone and in a batch. PyTorch's libraries choose their
        algorithm by the batch, so with them images run one by one.
        """
        pixels = UNLIMITED
        if isinstance(network, PixelNetwork):
            pixels = _fitting(device, bytes_per_pixel(launches, traced_pixels))
        return cls(
            tile=tile,
            pixels=pixels,
            batch_pixels=BATCH_PIXELS if backend == "triton" or device.type == "meta" else 1,
            tile_batch=TILE_BATCH if device.type == "cuda" else 1,
        )

    def images(self, pixels: int) -> int:
        """How many images of so many pixels run together."""
        return min(max(min(self.batch_pixels, self.pixels) // pixels, 1), BATCH_IMAGES)

    def tile_side(self, height: int, width: int) -> int:
        """Side of a UNet's tiles for images [N,3,H,W]: at least the longer side for one that runs whole."""
        if self.tile is not None:
            return self.tile
        longest = max(height, width)
        if height * width <= self.pixels:
            return longest
        return max(min(rung(math.isqrt(self.pixels)), longest), SMALLEST_TILE)

    def tiles_together(self, side: int) -> int:
        """Tiles of a UNet that run at once: a power of two, within the batch's limit and the memory's."""
        fitting = min(self.tile_batch, self.pixels // side**2)
        return 1 << (max(fitting, 1).bit_length() - 1)

    def smaller(
        self, network: Network, shape: tuple[int, ...], device: torch.device, error: str
    ) -> tuple[Limits, str]:  # fmt: skip
        """After images [N,3,H,W] ran out of memory: limits for another attempt, and what they allow.

        Images in a batch first, then tiles in a batch, then the tiles themselves. error: the exception's text. Raises
        OutOfMemory at the end of it, and at once for tiles of an explicit size that do not fit one by one.
        """
        n, _, height, width = shape
        if n > 1:
            return replace(self, batch_pixels=n // 2 * height * width), f"batches of {n // 2} images"
        if isinstance(network, LatentNetwork):
            return self._smaller_latents(network, device, error)
        return self._smaller_pixels(height, width, device, error)

    def _smaller_latents(self, network: LatentNetwork, device: torch.device, error: str) -> tuple[Limits, str]:
        if self.window_batch > 1:
            batch = self.window_batch // 2
            return replace(self, window_batch=batch), f"{batch} windows at once"
        if self.vae_core <= SMALLEST_CORE:
            side = (SMALLEST_CORE + 2 * network.halo) * network.factor
            raise OutOfMemory(
                f"a tile of {side}x{side} enlarged pixels, the smallest, needs {shortage(device, error)}; "
                "close other programs, or use another device"
            )
        core = max(self.vae_core // 2, SMALLEST_CORE)
        side = (core + 2 * network.halo) * network.factor
        return replace(self, vae_core=core), f"tiles of {side}x{side} enlarged pixels"

    def _smaller_pixels(self, height: int, width: int, device: torch.device, error: str) -> tuple[Limits, str]:
        side = self.tile_side(height, width)
        whole = side >= max(height, width)
        if self.tile_batch > 1 and not whole:
            return replace(self, tile_batch=self.tile_batch // 2), f"{self.tile_batch // 2} tiles at once"
        if self.tile is not None or side <= SMALLEST_TILE:
            chosen = ", the size asked for," if self.tile is not None else ", the smallest,"
            remedy = f"use a tile below {self.tile}, " if self.tile is not None else ""
            raise OutOfMemory(
                f"a tile of {side}x{side} pixels{chosen} needs {shortage(device, error)}; "
                f"{remedy}close other programs, or use another device"
            )
        limits = replace(self, pixels=height * width // 2 if whole else rung(side - 1) ** 2)
        side = limits.tile_side(height, width)
        return limits, f"tiles of {side}x{side} pixels, so it may differ slightly; tile={side} chooses that for all"


def rung(number: int) -> int:
    """The largest 2^k or 3 * 2^k that is not above the number (at least 1)."""
    power = 1 << (max(number, 1).bit_length() - 1)
    return power * 3 // 2 if 2 * number >= 3 * power else power


def memory_class(device: torch.device) -> int | None:
    """Total memory of a device in bytes, rounded down to 2^k or 3 * 2^k MiB; None where it cannot be told.

    Rounded, because drivers and kernels keep back a little more or less of it from version to version.
    """
    if device.type == "cuda":
        total: int | None = torch.cuda.get_device_properties(device).total_memory
    else:
        total = total_memory()
    return None if total is None else rung(total >> 20) << 20


def _fitting(device: torch.device, per_pixel: float) -> int:
    memory = memory_class(device)
    if memory is None or per_pixel == 0:
        return UNLIMITED
    return int(memory * (GPU_SHARE if device.type == "cuda" else HOST_SHARE) / per_pixel)


def bytes_per_pixel(calls: list[Call], pixels: int) -> float:
    """An estimate of the memory one call of a network takes per low-resolution pixel, from its launches.

    Three times its largest operation: reference operators compute in float32 with intermediate results of their own,
    and skip connections stay alive beside them.
    """
    return 3 * max(call.cost.bytes for call in calls) / pixels
