"""Transparency: fill the color of transparent pixels before the network runs, and upscale alpha separately.

The color of a fully transparent pixel is arbitrary (often black), and the network would spread it across the edges of
the visible object. It is replaced by an average of the nearest visible colors: build a pyramid of alpha * color and
alpha by 2x2 averaging, and fill each hole from the finest level that covers it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _fill(weighted: Tensor, weight: Tensor) -> Tensor:
    """weighted [N,C,H,W] = color * weight, weight [N,1,H,W] >= 0 -> color, filled in where weight is 0."""
    levels = [(weighted, weight)]
    while max(weight.shape[-2:]) > 1 and bool((weight == 0).any()):
        weighted = F.avg_pool2d(weighted, 2, ceil_mode=True, count_include_pad=False)
        weight = F.avg_pool2d(weight, 2, ceil_mode=True, count_include_pad=False)
        levels.append((weighted, weight))
    filled: Tensor | None = None
    for weighted, weight in reversed(levels):
        known = weighted / torch.where(weight > 0, weight, torch.ones_like(weight))
        if filled is not None:
            coarse = F.interpolate(filled, size=weight.shape[-2:], mode="bilinear", align_corners=False)
            known = torch.where(weight > 0, known, coarse)
        filled = known
    assert filled is not None
    return filled


def bleed(color: Tensor, alpha: Tensor) -> Tensor:
    """Replace the color of fully transparent pixels with that of visible pixels nearby.

    color [N,C,H,W] and alpha [N,1,H,W], float in [0,1] -> [N,C,H,W]. Pixels with alpha > 0 are unchanged; so is an
    image without any such pixel.
    """
    visible = alpha > 0
    if bool(visible.all()):
        return color
    any_visible = visible.flatten(1).any(1).view(-1, 1, 1, 1)
    return torch.where(visible | ~any_visible, color, _fill(color * alpha, alpha))


def enlarge_alpha(alpha: Tensor, upscale: int) -> Tensor:
    """alpha [N,1,H,W], float in [0,1] -> [N,1,s*H,s*W], bicubic (a = -0.75), clamped to [0,1]; s: upscale."""
    height, width = alpha.shape[-2:]
    size = (height * upscale, width * upscale)
    return F.interpolate(alpha, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
