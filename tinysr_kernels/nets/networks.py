"""The two forms of a whole network that the runtime knows, and so the two ways in which it tiles an image.

A `LatentNetwork` encodes, works on latents in windows of one size, and decodes: its halves run in exact tiles with a
halo, its middle in blended windows. A `PixelNetwork` takes the low-resolution image whole, or in blended tiles. A
family's `build` returns one or the other (`families/base.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinysr_kernels.nets.layers import ops

SMALLEST_WINDOW = 32
"""Sides of a transformer's windows in enlarged pixels; the released network has 512."""


def resize(image: Tensor, factor: int, dtype: torch.dtype, *, pillow: bool = False, clamp: bool = False) -> Tensor:
    """[N,3,H,W] in [0,1], or uint8 that holds 255 times as much -> [N,3,factor*H,factor*W] in `dtype`.

    pillow: with Pillow's bicubic kernel and borders instead of PyTorch's, and clamped to [0,1]. clamp: clamped too.
    """
    mul = 1 / 255 if image.dtype == torch.uint8 else 1.0
    return ops.resize_bicubic(image, factor, mul, 0.0, dtype, pillow, pillow or clamp)


class LatentNetwork(nn.Module):
    """The enlarged image in, the restored one of the same size out, by way of latents.

    encoder: image in [0,1] [N,3,factor*h,factor*w] -> latent [N,C,h,w]. transformer: latent of `window` x `window` ->
    the same shape. decoder: latent -> image. window, overlap and halo are in latent pixels: the side of the
    transformer's windows; what neighboring windows share per axis, at most half of one; the context with which encoder
    and decoder give in tiles what they give on the whole. factor: image pixels per latent pixel and axis.
    """

    prompt_width: int | None = None
    """See `PixelNetwork`."""

    def __init__(
        self,
        encoder: nn.Module,
        transformer: nn.Module,
        decoder: nn.Module,
        *,
        factor: int,
        window: int,
        overlap: int,
        halo: int,
    ) -> None:
        """ValueError for windows so small that an ordinary image would take thousands of them."""
        super().__init__()
        if window * factor < SMALLEST_WINDOW:
            raise ValueError(f"windows of {window * factor} pixels a side, expected at least {SMALLEST_WINDOW}")
        self.encoder = encoder
        self.transformer = transformer
        self.decoder = decoder
        self.factor = factor
        self.window = window
        self.overlap = min(overlap, window // 2)
        self.halo = halo

    def forward(self, image: Tensor) -> Tensor:
        """Enlarged image [N,3,window*factor,window*factor] in [0,1] -> restored image, the same shape."""
        return self.decoder(self.transformer(self.encoder(image)))


class PixelNetwork(nn.Module):
    """The low-resolution image in, the enlarged one out; families derive from it.

    forward: [N,3,H,W] in [0,1] or uint8 -> [N,3,upscale*H,upscale*W], [0,1] up to overshoot. upscale: a whole factor.
    multiple: H and W are multiples of it, and at least `least`; other images are padded.
    """

    prompt_width: int | None = None
    """X where each image has a prompt of its own, whose embedding [T,X] `nets.transformer.prompted` sets."""

    def __init__(self, upscale: int, multiple: int = 1, least: int = 1) -> None:
        super().__init__()
        self.upscale = upscale
        self.multiple = multiple
        self.least = -(-least // multiple) * multiple

    def set_upscale(self, upscale: int) -> bool:
        """Whether the network enlarges by this factor, from now on."""
        return upscale == self.upscale


Network = LatentNetwork | PixelNetwork
