"""The colour fix: ties the colours of the enlarged image to those of the original, once, over the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

from tinysr_kernels.families import ColorFix, Family
from tinysr_kernels.ops import color  # noqa: F401  (registers the operators)

ops = torch.ops.tinysr
TINYSR_EPS = 1e-5
"""TinySR adds this to the variances of images in [0,1]."""
FLAT_STD = 1 / 255
"""Below this standard deviation an image is flat, and dividing by it would only amplify noise."""


def fix_colors(sr: Tensor, lr: Tensor, method: ColorFix, family: Family, upscale: int) -> Tensor:
    """[N,3,sH,sW] and its original [N,3,H,W], both in [0,1] -> the fixed image, clamped to [0,1].

    adain gives every channel the original's mean and standard deviation; wavelet the original's low frequencies;
    none only clamps. TinySR clamps before measuring and regularises with an epsilon, AdcSR does neither
    (FORMATS of the two releases), with the gain bounded for flat images.
    """
    if method == "none":
        return sr.clamp(0, 1)
    if method == "wavelet":
        return ops.wavelet_fix(sr.clamp(0, 1), ops.resize_bicubic(lr, upscale).clamp(0, 1))
    if family == "tinysr-dit":
        sr = sr.clamp(0, 1)
    mean_sr, var_sr = ops.channel_stats(sr)
    mean_lr, var_lr = ops.channel_stats(lr)
    if family == "tinysr-dit":
        gain = ((var_lr + TINYSR_EPS) / (var_sr + TINYSR_EPS)).sqrt()
    else:
        gain = var_lr.sqrt() / var_sr.sqrt().clamp(min=FLAT_STD)
    return ops.affine_clamp(sr, gain, mean_lr - gain * mean_sr)
