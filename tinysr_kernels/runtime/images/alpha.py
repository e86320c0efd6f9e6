"""Transparency: colour bled under transparent pixels before the network, alpha enlarged beside it.

What lies under a fully transparent pixel is arbitrary (often black), and a network would drag it across the
edge of the object. So it is replaced by the average of the nearest visible colours: a pyramid of sums of
alpha * colour and of alpha is built by 2x2 averages (each pixel counts by its alpha), and every hole is
filled from the finest level that knows something there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _fill(weighted: Tensor, weight: Tensor) -> Tensor:
    """weighted [N,C,H,W] = colour * weight, weight [N,1,H,W] >= 0 -> colour, defined wherever an image has weight."""
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


def bleed(colour: Tensor, alpha: Tensor) -> Tensor:
    """Replace the colour of fully transparent pixels by that of their visible neighbourhood.

    colour [N,C,H,W] and alpha [N,1,H,W], float in [0,1] -> [N,C,H,W]. Pixels with alpha above 0 keep their colour
    exactly; an image without any such pixel keeps all of it.
    """
    visible = alpha > 0
    if bool(visible.all()):
        return colour
    anything = visible.flatten(1).any(1).view(-1, 1, 1, 1)
    return torch.where(visible | ~anything, colour, _fill(colour * alpha, alpha))


def enlarge_alpha(alpha: Tensor, upscale: int) -> Tensor:
    """alpha [N,1,H,W], float in [0,1] -> [N,1,s*H,s*W], bicubic (a = -0.75), clamped to [0,1]."""
    height, width = alpha.shape[-2:]
    size = (height * upscale, width * upscale)
    return F.interpolate(alpha, size=size, mode="bicubic", align_corners=False).clamp(0, 1)
