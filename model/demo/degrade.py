"""Synthetic degradation of images: blur, downsampling by four, noise, JPEG.

After the degradations of Real-ESRGAN (Wang et al., ICCVW 2021, arXiv 2107.10833): one full order, plus, for some
images, a light second one (the small image is resampled and back), at moderate strengths. All randomness comes from
the generator passed in.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

Array = NDArray[np.float32]
Rng = np.random.Generator
Resize = Literal["area", "bilinear", "bicubic"]
SCALE = 4


@dataclass(frozen=True)
class Degradation:
    """The parameters of one degradation."""

    sigma_x: float = 1.6
    """Standard deviations of the Gaussian blur along its axes, in pixels of the large image; 0 for none."""
    sigma_y: float = 1.6
    angle: float = 0.0
    resize: Resize = "bicubic"
    resample_factor: float = 1.0
    """The small image is resampled to this multiple of its size and back; 1 for not at all."""
    gaussian_noise: float = 12.0 / 255
    """Standard deviation of additive noise."""
    shot_noise: float = 0.0
    """Variance of the shot noise at full brightness."""
    gray_noise: bool = False
    jpeg: int | None = 65
    """JPEG quality (Pillow's scale), None for none."""


# Fixed for the evaluation on photographs: the midpoints of the ranges that Real-ESRGAN's published options give its
# first stage (blur 0.2 to 3 pixels, Gaussian noise 1 to 30 of 255, JPEG quality 30 to 95); and one lighter, one
# heavier, to show how the gain depends on the damage.
EVALUATION = Degradation(gaussian_noise=15.5 / 255, jpeg=62)
LIGHT = Degradation(sigma_x=0.8, sigma_y=0.8, gaussian_noise=5.0 / 255, jpeg=85)
HEAVY = Degradation(sigma_x=2.4, sigma_y=2.4, gaussian_noise=22.0 / 255, jpeg=45)


def random(rng: Rng) -> Degradation:
    """Draw the parameters of one training degradation."""
    sigma = float(rng.uniform(0.2, 3.0))
    stretched = rng.random() < 0.4
    shot = rng.random() < 0.4
    return Degradation(
        sigma_x=sigma,
        sigma_y=float(rng.uniform(0.2, 3.0)) if stretched else sigma,
        angle=float(rng.uniform(0, np.pi)),
        resize=rng.choice(["area", "bilinear", "bicubic"]),
        resample_factor=float(rng.uniform(0.7, 1.5)) if rng.random() < 0.25 else 1.0,
        gaussian_noise=float(rng.uniform(0, 15 if shot else 25)) / 255,
        shot_noise=float(rng.uniform(0, 20) / 255) ** 2 if shot else 0.0,
        gray_noise=bool(rng.random() < 0.4),
        jpeg=int(rng.integers(35, 96)) if rng.random() < 0.9 else None,
    )


# ------------------------------------------------------------------------------------------- blur and reduction
def _resize_profile(kind: Resize) -> NDArray[np.float64]:
    """One axis of an antialiased reduction by four, [16], summing to 1: box, triangle or cubic (a = -0.5)."""
    # Output pixel i lies at 4i + 1.5 of the large image, so taps are at half-integer distances.
    t = np.abs(np.arange(16) - 7.5) / SCALE
    if kind == "area":
        taps = (t < 0.5).astype(np.float64)
    elif kind == "bilinear":
        taps = np.maximum(1 - t, 0)
    else:
        near = 1.5 * t**3 - 2.5 * t**2 + 1
        far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
        taps = np.where(t < 1, near, np.where(t < 2, far, 0.0))
    return taps / taps.sum()


def kernel(how: Degradation, reach: int = 10) -> Array:
    """Blur and reduction as one kernel [2*reach+16, 2*reach+16] that sums to 1, to be applied with stride 4."""
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    u = x * np.cos(how.angle) + y * np.sin(how.angle)
    v = y * np.cos(how.angle) - x * np.sin(how.angle)
    # Below 0.2 pixels a sampled Gaussian is a single tap.
    blur = np.exp(-0.5 * ((u / max(how.sigma_x, 0.1)) ** 2 + (v / max(how.sigma_y, 0.1)) ** 2))
    blur /= blur.sum()
    profile = _resize_profile(how.resize)
    spread = np.stack([np.convolve(row, profile) for row in blur])
    spread = np.stack([np.convolve(column, profile) for column in spread.T]).T
    return spread.astype(np.float32)


def reduce(images: list[Array], kernels: list[Array]) -> list[Array]:
    """Each image [4H,4W,3] under its kernel [K,K] with stride 4 -> [H,W,3], borders reflected; equal sizes."""
    large = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).flatten(0, 1)[None]
    size = kernels[0].shape[0]
    weights = torch.from_numpy(np.stack(kernels)).repeat_interleave(3, dim=0)[:, None]
    before = size // 2 - SCALE // 2
    padded = F.pad(large, (before, before, before, before), mode="reflect")
    small = F.conv2d(padded, weights, stride=SCALE, groups=weights.shape[0])[0]
    return list(small.unflatten(0, (-1, 3)).permute(0, 2, 3, 1).numpy())


# ------------------------------------------------------------------------------------------------ noise and JPEG
def add_noise_and_jpeg(small: Array, how: Degradation, rng: Rng) -> Array:
    """Resampling, noise and JPEG on a small image [H,W,3] in [0,1] -> the same, rounded to 8 bits."""
    if how.resample_factor != 1.0:
        small = _resample(small, how.resample_factor)
    shape = (*small.shape[:2], 1 if how.gray_noise else 3)
    bright = np.clip(small.mean(axis=2, keepdims=True) if how.gray_noise else small, 0, 1)
    noise = rng.normal(size=shape) * np.sqrt(how.gaussian_noise**2 + how.shot_noise * bright)
    bytes_ = np.round(np.clip(small + noise, 0, 1) * 255).astype(np.uint8)
    if how.jpeg is not None:
        buffer = io.BytesIO()
        Image.fromarray(bytes_).save(buffer, "JPEG", quality=how.jpeg)
        bytes_ = np.asarray(Image.open(buffer))
    return bytes_.astype(np.float32) / np.float32(255)


def _resample(small: Array, factor: float) -> Array:
    x = torch.from_numpy(np.ascontiguousarray(small)).permute(2, 0, 1)[None]
    size = x.shape[2:]
    away = [max(1, round(side * factor)) for side in size]
    x = F.interpolate(x, away, mode="bilinear", align_corners=False, antialias=True)
    x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def degrade(image: Array, how: Degradation, rng: Rng) -> Array:
    """An image [4H,4W,3] in [0,1] -> its degraded quarter [H,W,3] in [0,1], float32 on the 8-bit grid.

    Raises ValueError unless both sides are multiples of four and larger than the kernel's overhang.
    """
    if image.ndim != 3 or image.shape[0] % SCALE or image.shape[1] % SCALE or min(image.shape[:2]) < 20:
        raise ValueError(f"expected [4H,4W,3] with sides of at least 20, found {image.shape}")
    return add_noise_and_jpeg(reduce([image], [kernel(how)])[0], how, rng)
