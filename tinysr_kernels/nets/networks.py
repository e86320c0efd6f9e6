"""Whole networks, by family: how the parts fit together, and the two shapes a pipeline meets."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tinysr_kernels.errors import InputError
from tinysr_kernels.families import UPSCALE, Config, Family, TinySRConfig, UNetConfig
from tinysr_kernels.nets import fp8, kl_decoder, pruned_unet, tiny_vae, tinysr_dit
from tinysr_kernels.nets.layers import Folded, ops


def fold(
    family: Family, config: Config, tensors: Mapping[str, Tensor], dtype: torch.dtype, quantize: str | None = None
) -> dict[str, Tensor]:
    """Fold a normalised checkpoint for one compute dtype: matrices in it, vectors in float32 or wider.

    quantize: "fp8" for TinySR's transformer in e4m3 where fp8.py says; the rest of it is then left in float64 for
    `place`. InputError for other families.
    """
    if quantize is not None:
        check_quantize(family)
    if isinstance(config, TinySRConfig):
        transformer = tinysr_dit.fold(tensors, torch.float64 if quantize else dtype)
        return {
            **(fp8.to_fp8(transformer) if quantize else transformer),
            **tiny_vae.fold_encoder(tensors, dtype, config.encoder_blocks, config.scaling_factor),
            **tiny_vae.fold_decoder(tensors, dtype, config.decoder_blocks),
        }
    folded = dict(pruned_unet.fold_unet(tensors, config, dtype))
    if config.input == "vae":
        folded |= tiny_vae.fold_encoder(tensors, dtype, config.encoder_blocks, config.scaling_factor)
    if _has_tiny_decoder(tensors):
        # the bicubic residual u joins in [0,1]: (2y-1 + 2u-1)/2 + 1/2 = y + u - 1/2
        out_bias = -0.5 if config.residual == "bicubic" else 0.0
        folded |= tiny_vae.fold_decoder(tensors, dtype, config.decoder_blocks, out_bias)
    else:
        folded |= kl_decoder.fold_decoder(tensors, config, dtype)
    return folded


def check_quantize(family: Family) -> None:
    """InputError unless networks of the family have an fp8 form."""
    if family != "tinysr-dit":
        raise InputError(
            f"quantize='fp8' is for tinysr-dit's transformer, this checkpoint is {family}; use quantize=None"
        )


def build(family: Family, config: Config, folded: Folded) -> Network:
    """The network over folded tensors. KeyError names a tensor that is missing."""
    if isinstance(config, TinySRConfig):
        return LatentNetwork(folded, config)
    return PixelNetwork(folded, config)


def _has_tiny_decoder(names: Mapping[str, object]) -> bool:
    return any(name.startswith("decoder.layers.") for name in names)


def resize(image: Tensor, factor: int, dtype: torch.dtype) -> Tensor:
    """[N,3,H,W] in [0,1], or uint8 that holds 255 times as much -> [N,3,factor*H,factor*W] in `dtype`."""
    return ops.resize_bicubic(image, factor, 1 / 255 if image.dtype == torch.uint8 else 1.0, 0.0, dtype)


class LatentNetwork(nn.Module):
    """TinySR: encoder and decoder run on any size, the transformer on windows of one size."""

    def __init__(self, folded: Folded, config: TinySRConfig) -> None:
        super().__init__()
        self.encoder = tiny_vae.Encoder(folded, config.encoder_blocks)
        transformer = fp8.Transformer if fp8.is_fp8(folded) else tinysr_dit.Transformer
        self.transformer = transformer(folded, config)
        self.decoder = tiny_vae.Decoder(folded, config.decoder_blocks, config.scaling_factor)
        # latent pixels of context with which both halves give the same result in tiles as on the whole
        self.halo = max(tiny_vae.halo(config.encoder_blocks), tiny_vae.halo(config.decoder_blocks[::-1]))

    @property
    def window(self) -> int:
        """Side of the transformer's window in latent pixels."""
        return self.transformer.window

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel and axis."""
        return self.encoder.factor

    def forward(self, image: Tensor) -> Tensor:
        """Enlarged image [N,3,window*factor,window*factor] in [0,1] -> restored image, the same shape."""
        return self.decoder(self.transformer(self.encoder(image)))


class PixelNetwork(nn.Module):
    """AdcSR and tinysr-unet: the low-resolution image in, the image four times larger out."""

    def __init__(self, folded: Folded, config: UNetConfig) -> None:
        super().__init__()
        self.unet = pruned_unet.UNet(folded, config)
        self.encoder: tiny_vae.Encoder | None = None
        self.decoder: tiny_vae.Decoder | kl_decoder.KLDecoder
        if config.input == "vae":
            self.encoder = tiny_vae.Encoder(folded, config.encoder_blocks)
        if _has_tiny_decoder(folded):
            self.decoder = tiny_vae.Decoder(folded, config.decoder_blocks, config.scaling_factor)
        else:
            self.decoder = kl_decoder.KLDecoder(folded, config)
        self.residual = config.residual == "bicubic"
        self.latent_gain = 1 / config.scaling_factor if isinstance(self.decoder, kl_decoder.KLDecoder) else 1.0
        inside = config.unshuffle if self.encoder is None else self.encoder.factor
        self.reduction = inside * self.unet.factor
        self.upscale = self.decoder.factor // config.unshuffle if self.encoder is None else UPSCALE

    @property
    def multiple(self) -> int:
        """Sides of the low-resolution image must be multiples of this."""
        if self.encoder is None:
            return self.reduction
        return self.reduction // math.gcd(self.reduction, self.upscale)

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


Network = LatentNetwork | PixelNetwork
