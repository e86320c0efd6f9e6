"""Whole inference in plain PyTorch, from an image to one four times as large: the compiled models' oracle.

Images are [N,3,H,W] in [0,1], of the dtype of the networks' weights; results are [N,3,4H,4W] in [0,1].
Everything stays in floating point: unlike the public scripts nothing is rounded to 8 bits on the way, and
awkward sizes are padded and cropped where TinySR's script resamples and AdcSR's fails.

`tinysr` follows github.com/Microtreei/TinySR (test/test_tinysr.py), `adcsr` github.com/Guaishou74851/AdcSR
(test.py); the wavelet color fix is StableSR's (arXiv 2305.07015). Where the scripts neither resample nor
fail, and but for their 8-bit roundings, the results are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.pruned_unet import PrunedUNet
from model.reference.tiny_vae import TinyEncoder, TinyVAE
from model.reference.tinysr_dit import TinySRTransformer
from tinysr_kernels.families import ColorFix, TinySRConfig, UNetConfig

UPSCALE = 4
TILE_VARIANCE = 0.01
ADAIN_EPS = 1e-5
FLAT_STD = 1 / 255
"""Deviation, in [0,1], under which an image counts as flat: AdcSR's gain grows no further."""
WAVELET_LEVELS = 5


# -------------------------------------------------------------------------------------------------- sizes
def pad_to(image: Tensor, multiple: int, least: int = 1) -> Tensor:
    """Pad right and bottom until both sides are multiples of `multiple` and at least `least`.

    Each axis by reflection; by repeating its border where one reflection would not reach. [N,C,H,W] ->
    [N,C,H',W'].
    """
    height, width = image.shape[2:]
    image = _pad_axis(image, 3, _fitting(width, multiple, least))
    return _pad_axis(image, 2, _fitting(height, multiple, least))


def _fitting(side: int, multiple: int, least: int) -> int:
    return math.ceil(max(side, least) / multiple) * multiple


def _pad_axis(image: Tensor, axis: int, side: int) -> Tensor:
    size = image.shape[axis]
    if side == size:
        return image
    place = torch.arange(side, device=image.device)
    if side - size < size:
        place = torch.where(place < size, place, 2 * (size - 1) - place)
    return image.index_select(axis, place.clamp(max=size - 1))


def bicubic(image: Tensor, factor: int = UPSCALE) -> Tensor:
    """Enlarge [N,C,H,W] by a whole factor: Keys kernel, a = -0.75, half-pixel centers, no clamp."""
    height, width = image.shape[2:]
    return F.interpolate(image, size=(height * factor, width * factor), mode="bicubic", align_corners=False)


def pillow_bicubic(image: Tensor, factor: int = UPSCALE) -> Tensor:
    """Enlarge [N,C,H,W] in [0,1] as Pillow does: a = -0.5, taps outside the image dropped, then clamped to [0,1].

    In float32 or wider: PyTorch has no 16-bit form for the CPU.
    """
    size = (image.shape[2] * factor, image.shape[3] * factor)
    wide = image.to(torch.promote_types(image.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="bicubic", antialias=True).clamp(0, 1).to(image.dtype)


# ------------------------------------------------------------------------------------------ color fixes
def channel_stats(image: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance per sample and channel, [N,C,1,1]; the variance of a single pixel is 0."""
    pixels = image.shape[2] * image.shape[3]
    mean = image.mean(dim=(2, 3), keepdim=True)
    return mean, (image - mean).square().sum(dim=(2, 3), keepdim=True) / max(pixels - 1, 1)


def adain(sr: Tensor, lr: Tensor) -> Tensor:
    """TinySR's color fix: mean and deviation of lr per channel, deviation = sqrt(variance + 1e-5).

    Both in [0,1], any two sizes; the result is not clamped.
    """
    (mean, variance), (lr_mean, lr_variance) = channel_stats(sr), channel_stats(lr)
    return (sr - mean) / (variance + ADAIN_EPS).sqrt() * (lr_variance + ADAIN_EPS).sqrt() + lr_mean


def adain_plain(sr: Tensor, lr: Tensor) -> Tensor:
    """AdcSR's color fix: as `adain`, but without the 1e-5; in [-1,1], not clamped.

    The deviation divided by is at least that of a flat image (1/255 of the range), which bounds the gain.
    Wherever sr varies more than that, the result is the public script's.
    """
    (mean, variance), (lr_mean, lr_variance) = channel_stats(sr), channel_stats(lr)
    return (sr - mean) / variance.sqrt().clamp(min=2 * FLAT_STD) * lr_variance.sqrt() + lr_mean


def wavelet(sr: Tensor, style: Tensor) -> Tensor:
    """sr's details over the colors of `style` (same size, [0,1]); not clamped.

    A decomposition keeps the five high bands of sr and takes the low band of `style`. Since the bands of one
    image sum to its difference from its own low band, that is sr + low(style - sr).
    """
    low = style - sr
    for level in range(WAVELET_LEVELS):
        low = blur(low, 2**level)
    return sr + low


def blur(image: Tensor, dilation: int) -> Tensor:
    """[1,2,1] x [1,2,1] / 16 with its taps `dilation` pixels apart, borders repeated; [N,C,H,W] -> same."""
    channels = image.shape[1]
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=image.dtype, device=image.device)
    kernel = torch.outer(taps, taps).expand(channels, 1, 3, 3)
    padded = F.pad(image, (dilation,) * 4, mode="replicate")
    return F.conv2d(padded, kernel, dilation=dilation, groups=channels)


# ------------------------------------------------------------------------------------------------ TinySR
def tile_starts(length: int, window: int, overlap: int) -> list[int]:
    """Where tiles that cover `length` begin: every window - overlap, the last one pulled back to the end."""
    steps = math.ceil((length - window) / (window - overlap))
    return [i * (window - overlap) for i in range(steps)] + [length - window]


def tile_weight(window: int, symmetric: bool = False) -> Tensor:
    """[window,window] float64: a Gaussian of variance 0.01, sides as 1, about (window/2, (window-1)/2).

    Down and across, the public code's centers differ by half a pixel; PiSA-SR's do not.
    """
    place = torch.arange(window, dtype=torch.float64)

    def bell(middle: float) -> Tensor:
        distance = (place - middle) / window
        return torch.exp(-distance.square() / (2 * TILE_VARIANCE)) / math.sqrt(2 * math.pi * TILE_VARIANCE)

    return torch.outer(bell((window - 1) / 2 if symmetric else window / 2), bell((window - 1) / 2))


def predict(
    z: Tensor, transformer: Callable[[Tensor], Tensor], window: int, overlap: int, symmetric: bool = False
) -> Tensor:
    """The transformer's prediction for a latent [N,C,h,w], h, w >= window; in tiles where it is larger.

    Tiles are summed, weighted, in float32 or wider, and divided by the sum of the weights.
    """
    height, width = z.shape[2:]
    if (height, width) == (window, window):
        return transformer(z)
    total = torch.zeros_like(z, dtype=torch.promote_types(z.dtype, torch.float32))
    weights = torch.zeros_like(total)
    weight = tile_weight(window, symmetric).to(total)
    for top in tile_starts(height, window, overlap):
        for left in tile_starts(width, window, overlap):
            tile = (..., slice(top, top + window), slice(left, left + window))
            total[tile] += transformer(z[tile]) * weight
            weights[tile] += weight
    return (total / weights).to(z.dtype)


@torch.no_grad()
def tinysr(
    image: Tensor,
    transformer: TinySRTransformer,
    vae: TinyVAE,
    config: TinySRConfig,
    color_fix: ColorFix = "adain",
    upscale: int = UPSCALE,
) -> Tensor:
    """TinySR on images [N,3,H,W] of any size; `transformer` with its modulation cached."""
    height, width = image.shape[2:]
    factor, window = vae.encoder.factor, transformer.window
    multiple = factor // math.gcd(factor, upscale)
    lr = pad_to(image, multiple, least=math.ceil(window * factor / upscale))
    z = vae.encode(bicubic(lr, upscale) * 2 - 1) * config.scaling_factor
    z = z - predict(z, transformer, window, config.overlap)
    sr = vae.decode(z / config.scaling_factor)[..., : height * upscale, : width * upscale]
    sr = sr.clamp(-1, 1) / 2 + 0.5
    if color_fix == "adain":
        sr = adain(sr, image)
    elif color_fix == "wavelet":
        sr = wavelet(sr, pillow_bicubic(image, upscale))
    return sr.clamp(0, 1)


# ------------------------------------------------------------------------------------------- pruned UNets
def run_unet(
    lr: Tensor, unet: PrunedUNet, decoder: nn.Module, config: UNetConfig, encoder: TinyEncoder | None = None
) -> Tensor:
    """The networks alone, on lr [N,3,H,W] in [-1,1]: [N,3,4H,4W] around [-1,1], without clamp."""
    if encoder is None:
        z = unet(F.pixel_unshuffle(lr, config.unshuffle))
    else:
        z = encoder(bicubic(lr)) * config.scaling_factor
        z = z - unet(z) if config.prediction == "subtract" else unet(z)
        z = z / config.scaling_factor
    sr = decoder(z)
    return sr + bicubic(lr) if config.residual == "bicubic" else sr


def lr_multiple(unet: PrunedUNet, config: UNetConfig, encoder: TinyEncoder | None = None) -> int:
    """What the sides of the networks' input must be multiples of (16 for AdcSR)."""
    halvings = sum(len(list(block.get_submodule("downsamplers").children())) for block in unet.down_blocks)
    latent = 2**halvings
    if encoder is None:
        return config.unshuffle * latent
    side = encoder.factor * latent
    return side // math.gcd(side, UPSCALE)


@torch.no_grad()
def unet_sr(
    image: Tensor,
    unet: PrunedUNet,
    decoder: nn.Module,
    config: UNetConfig,
    encoder: TinyEncoder | None = None,
) -> Tensor:
    """A pruned UNet on images [N,3,H,W] of any size, whole; with VAE input, `encoder` is its encoder."""
    height, width = image.shape[2:]
    lr = image * 2 - 1
    padded = pad_to(lr, lr_multiple(unet, config, encoder))
    sr = run_unet(padded, unet, decoder, config, encoder)[..., : height * UPSCALE, : width * UPSCALE]
    if config.color_fix == "adain":
        return (adain_plain(sr, lr) / 2 + 0.5).clamp(0, 1)
    sr = (sr / 2 + 0.5).clamp(0, 1)
    if config.color_fix == "wavelet":
        sr = wavelet(sr, pillow_bicubic(image)).clamp(0, 1)
    return sr


def adcsr(image: Tensor, unet: PrunedUNet, decoder: nn.Module, config: UNetConfig | None = None) -> Tensor:
    """AdcSR on images [N,3,H,W] of any size, untiled."""
    return unet_sr(image, unet, decoder, config or UNetConfig())
