"""A pruned UNet between the image, or a tiny VAE's encoder, and a KL or tiny decoder: AdcSR and tinysr-unet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tinysr_kernels.nets import kl_vae, pruned_unet, tiny_vae
from tinysr_kernels.nets.fold import folds as common_folds
from tinysr_kernels.nets.layers import Folded
from tinysr_kernels.nets.networks import PixelNetwork, resize

UPSCALE = 4
"""What a network enlarges by whose input is the encoder's latent of the enlarged image."""


class Options(pruned_unet.Options, kl_vae.Options, Protocol):
    """What the weights leave open; `families.UNetConfig` has these fields."""

    @property
    def scaling_factor(self) -> float:
        """The encoder's latents are multiplied by it, the decoder's divided."""

    @property
    def encoder_blocks(self) -> tuple[int, ...]:
        """Residual blocks per stage of a tiny VAE's encoder."""

    @property
    def decoder_blocks(self) -> tuple[int, ...]:
        """Residual blocks per stage of a tiny VAE's decoder."""


def fold(tensors: Mapping[str, Tensor], options: Options, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fold `unet.*`, `decoder.*` and, with VAE input, `encoder.*` of a normalized checkpoint."""
    folded = dict(pruned_unet.fold_unet(tensors, options, dtype))
    if options.input == "vae":
        folded |= tiny_vae.fold_encoder(tensors, dtype, options.encoder_blocks, options.scaling_factor)
    if _has_tiny_decoder(tensors):
        # the bicubic residual u joins in [0,1]: (2y-1 + 2u-1)/2 + 1/2 = y + u - 1/2
        out_bias = -0.5 if options.residual == "bicubic" else 0.0
        folded |= tiny_vae.fold_decoder(tensors, dtype, options.decoder_blocks, out_bias)
    else:
        folded |= kl_vae.fold_decoder(tensors, options, dtype)
    return folded


def folds(folded: Mapping[str, Tensor]) -> list[str]:
    """What `fold` has folded, one phrase each; the range map where the image itself is the input, too."""
    range_map = ["range map into the first and last convolution"] if "unet.conv_in.weight" in folded else []
    return [*range_map, *common_folds(folded)]


def _has_tiny_decoder(names: Mapping[str, object]) -> bool:
    return any(name.startswith("decoder.layers.") for name in names)


class UNetSR(PixelNetwork):
    """[N,3,H,W] in [0,1] or uint8 -> [N,3,s*H,s*W], s = 4 in all published networks; over folded tensors."""

    def __init__(self, folded: Folded, options: Options) -> None:
        unet = pruned_unet.UNet(folded, options)
        encoder = tiny_vae.Encoder(folded, options.encoder_blocks) if options.input == "vae" else None
        decoder: tiny_vae.Decoder | kl_vae.KLDecoder
        if _has_tiny_decoder(folded):
            decoder = tiny_vae.Decoder(folded, options.decoder_blocks, options.scaling_factor)
        else:
            decoder = kl_vae.KLDecoder(folded, options)
        if encoder is None:
            upscale = decoder.factor // options.unshuffle
            multiple = options.unshuffle * unet.factor
        else:
            upscale = UPSCALE
            reduction = encoder.factor * unet.factor
            multiple = reduction // math.gcd(reduction, upscale)
        super().__init__(upscale, multiple)
        self.unet = unet
        self.encoder = encoder
        self.decoder = decoder
        self.residual = options.residual == "bicubic"
        self.latent_gain = 1 / options.scaling_factor if isinstance(decoder, kl_vae.KLDecoder) else 1.0

    def forward(self, image: Tensor) -> Tensor:
        """[N,3,H,W] in [0,1] or uint8 -> [N,3,4H,4W], [0,1] up to overshoot; H and W multiples of `multiple`."""
        enlarged = None
        if self.residual or self.encoder is not None:
            first = self.unet.conv_in if self.encoder is None else self.encoder.layers["0"]
            enlarged = resize(image, self.upscale, first.get_buffer("weight").dtype)
        latent = self.unet(image if self.encoder is None else self.encoder(enlarged))
        if self.latent_gain != 1.0:
            latent = latent * self.latent_gain
        return self.decoder(latent, enlarged if self.residual else None)
