"""The color fix: ties the colors of the enlarged image to those of the original, once, over the whole image."""

from __future__ import annotations

import torch
from torch import Tensor

import tinysr_kernels.ops  # noqa: F401  (registers torch.ops.tinysr)
from tinysr_kernels.families import Adain, ColorFix
from tinysr_kernels.nets import resize

ops = torch.ops.tinysr


def fix_colors(
    sr: Tensor, lr: Tensor, method: ColorFix, adain: Adain, upscale: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The fixed image [N,3,sH,sW] in [0,1], and flags [N,...] that are true where sr was finite.

    sr [N,3,sH,sW] and its original lr [N,3,H,W], both in [0,1] but for sr's overshoot, lr in uint8 as well. dtype: of
    the result, sr's by default; uint8 is rounded to the nearest.

    method: "adain" gives every channel the original's mean and standard deviation, "wavelet" the original's low
    frequencies, "none" only clamps. adain: the family's variant of the first, since public codes differ.
    """
    if method == "none":
        return ops.clamp_image(sr, dtype)
    if method == "wavelet":
        return ops.wavelet_fix(sr, lr, upscale, dtype)
    style = resize(lr, upscale, torch.promote_types(sr.dtype, torch.float32), pillow=True) if adain.enlarged else lr
    return ops.adain_fix(sr, style, adain.eps, adain.least, adain.clamp, dtype)
