"""A small pruned UNet in this project's own layout: one file, or a folder with embeddings beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.kl_decoder import KLDecoder
from model.reference.pipelines import unet_sr
from model.reference.pruned_unet import PrunedUNet, Resnet
from model.reference.tiny_vae import TinyDecoder, TinyEncoder
from model.reference.tiny_vae import decoder_shapes as tiny_decoder_shapes
from model.reference.tiny_vae import encoder_shapes as tiny_encoder_shapes
from model.reference.unet_shapes import decoder_shapes, unet_shapes
from tests.layouts.weights import fill, fill_kl, fill_tiny, rounded, write_safetensors
from tinysr_kernels.families import UNetConfig, config_to_dict

MODEL = "model.safetensors"
EMBEDDINGS = "embeddings.safetensors"
TIME_CHANNELS = 20
Time = Literal["none", "inline", "bias", "temb"]


@dataclass
class UNetLayout:
    """What was written, and the networks that a loader must arrive at (time projections evaluated)."""

    path: Path
    unet: PrunedUNet
    decoder: nn.Module
    encoder: TinyEncoder | None
    config: UNetConfig

    def tensors(self) -> dict[str, Tensor]:
        """The normalized checkpoint: `unet.*`, `decoder.*` and, with VAE input, `encoder.*`."""
        parts = {"unet": self.unet, "decoder": self.decoder, "encoder": self.encoder}
        present = {name: part for name, part in parts.items() if part is not None}
        return {f"{name}.{k}": v for name, part in present.items() for k, v in part.state_dict().items()}

    def upscale(self, image: Tensor) -> Tensor:
        """The reference result, [N,3,4H,4W], computed in the image's dtype (float32 or float64)."""
        parts = [part for part in (self.unet, self.decoder, self.encoder) if part is not None]
        for part in parts:
            part.to(image.dtype)
        result = unet_sr(image, self.unet, self.decoder, self.config, self.encoder)
        for part in parts:
            part.float()
        return result


def write_unet(
    path: str | Path,
    config: UNetConfig | None = None,
    *,
    channels: Sequence[int] = (12, 24),
    layers: int = 1,
    transformers: Sequence[bool] | None = None,
    separable: bool = True,
    decoder: Literal["kl", "tiny"] = "kl",
    decoder_channels: Sequence[int] = (8, 12, 16, 24),
    attention: bool = True,
    vae_width: int = 12,
    latent_channels: int = 8,
    time: Time = "none",
    keep_projection: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> UNetLayout:
    """Write a checkpoint with small random weights stored in `dtype`, and return the networks it describes.

    path: a file; with `time` "bias" or "temb" a folder, which gets model.safetensors and
    embeddings.safetensors. time: "none"; "inline": each resnet's bias lies in the model file; "bias": it lies
    in the embeddings (the model file holds the projection too if `keep_projection`); "temb": the model file
    holds the projections, the embeddings temb. decoder: its widths are `decoder_channels`, narrowest first,
    or for the tiny decoder `vae_width` throughout. The decoder must enlarge by 4 times the unshuffling
    factor, or by the encoder's factor.
    """
    path, config = Path(path), config or UNetConfig(color_fix="none")
    latent = latent_channels if config.input == "vae" else 3 * config.unshuffle**2
    widest = decoder_channels[-1] if decoder == "kl" else latent_channels
    shapes = unet_shapes(
        latent,
        widest,
        channels,
        layers,
        separable=separable,
        transformers=transformers,
        time_bias=time != "none",
    )
    unet = PrunedUNet(shapes, config)
    fill(unet, seed)
    encoder = _encoder(config, vae_width, latent_channels, separable, seed)
    if decoder == "kl":
        out: nn.Module = _kl_decoder(config, decoder_channels, attention, separable, seed)
    else:
        out = _tiny_decoder(config, vae_width, latent_channels, separable, seed)
    for part in (unet, out, encoder):
        if part is not None:
            rounded(part, dtype)
    layout = UNetLayout(path, unet, out, encoder, config)
    projections, embeddings = _time(unet, time, keep_projection, dtype, seed)
    model = {k: v.to(dtype) for k, v in layout.tensors().items()}
    if time in ("bias", "temb"):
        model = {k: v for k, v in model.items() if not k.endswith("time_bias")} | projections
        write_safetensors(path / EMBEDDINGS, embeddings)
        path = path / MODEL
    write_safetensors(path, model, _metadata(config))
    return layout


def _encoder(config: UNetConfig, width: int, latent: int, separable: bool, seed: int) -> TinyEncoder | None:
    if config.input != "vae":
        return None
    shapes = tiny_encoder_shapes(width, latent, config.encoder_blocks, separable)
    encoder = TinyEncoder(shapes, config.encoder_blocks)
    fill_tiny(encoder, seed + 1)
    return encoder


def _kl_decoder(config: UNetConfig, channels: Sequence[int], attention: bool, separable: bool, seed: int) -> KLDecoder:
    decoder = KLDecoder(decoder_shapes(channels, 2, separable=separable, attention=attention), config)
    fill_kl(decoder, seed + 2)
    return decoder


def _tiny_decoder(config: UNetConfig, width: int, latent: int, separable: bool, seed: int) -> TinyDecoder:
    shapes = tiny_decoder_shapes(width, latent, config.decoder_blocks, separable)
    decoder = TinyDecoder(shapes, config.decoder_blocks)
    fill_tiny(decoder, seed + 2)
    return decoder


def _time(
    unet: PrunedUNet, time: Time, keep_projection: bool, dtype: torch.dtype, seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors for both files; with time "temb", the resnets' biases become what the projections give."""
    generator = torch.Generator().manual_seed(seed + 5)
    temb = torch.randn(1, TIME_CHANNELS, generator=generator).to(dtype)
    resnets = {f"unet.{name}": part for name, part in unet.named_modules() if isinstance(part, Resnet)}
    projections: dict[str, Tensor] = {}
    for name, resnet in resnets.items():
        if resnet.time_bias is None:
            continue
        outputs = resnet.time_bias.shape[0]
        weight = (torch.randn(outputs, TIME_CHANNELS, generator=generator) / TIME_CHANNELS**0.5).to(dtype)
        bias = torch.randn(outputs, generator=generator).to(dtype)
        projections |= {f"{name}.time_emb_proj.weight": weight, f"{name}.time_emb_proj.bias": bias}
        if time == "temb":
            resnet.time_bias.copy_((weight.double() @ F.silu(temb.double())[0] + bias.double()).float())
    if time == "temb":
        return projections, {"temb": temb}
    biases = {
        f"{name}.time_bias": part.time_bias.to(dtype) for name, part in resnets.items() if part.time_bias is not None
    }
    return (projections if keep_projection else {}), biases


def _metadata(config: UNetConfig) -> dict[str, str]:
    return {
        "format": "tinysr_kernels",
        "family": "tinysr-unet",
        "version": "1",
        "config": json.dumps(config_to_dict(config)),
    }
