"""Colour statistics and the colour fixes that tie the enlarged image to the original's colours.

channel_stats:  per sample and channel, mean and unbiased variance over all pixels.   x [N,C,H,W] -> two [N,C]
affine_clamp:   out = clamp(x * gain + offset, 0, 1), gain and offset [N,C]: the AdaIN colour fix, whose
                statistics become one gain and one offset a channel.
wavelet_fix:    out = clamp(x + L(style - x), 0, 1), L five blurs in turn with [1,2,1]x[1,2,1]/16 dilated by
                2^i, i = 0..4, replicate padding. The high bands of a five-level decomposition telescope, so
                this equals keeping x's details over style's colours at the cost of one blur chain.

Layouts: x, style and the fixed images [N,C,H,W], inputs of any strides, results channels_last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import Cost, check_rank, check_shape, empty_nhwc, nhwc, plain, register, size, wide

WAVELET_LEVELS = 5
STATS_SCHEMA = "channel_stats(Tensor x) -> (Tensor, Tensor)"
AFFINE_SCHEMA = "affine_clamp(Tensor x, Tensor gain, Tensor offset) -> Tensor"
WAVELET_SCHEMA = "wavelet_fix(Tensor x, Tensor style) -> Tensor"


def stats_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, unbiased variance), both [N,C] in float32 or wider; the variance of a single pixel is 0.

    Raises ValueError unless x has four dimensions.
    """
    check_rank("x", x, "N,C,H,W")
    flat = plain(x, wide(x.dtype)).flatten(2)
    variance, mean = torch.var_mean(flat, 2, correction=min(1, flat.shape[2] - 1))
    return mean, variance


def stats_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    check_rank("x", x, "N,C,H,W")
    shape = (x.shape[0], x.shape[1])
    return x.new_empty(shape, dtype=wide(x.dtype)), x.new_empty(shape, dtype=wide(x.dtype))


def stats_cost(x: Tensor) -> Cost:
    """FLOPs: 4 per element; bytes of x once and of the results."""
    return Cost(4 * x.numel(), size(x) + 2 * x.shape[0] * x.shape[1] * wide(x.dtype).itemsize)


def _check_affine(x: Tensor, gain: Tensor, offset: Tensor) -> None:
    check_rank("x", x, "N,C,H,W")
    check_shape("gain", gain, x.shape[:2])
    check_shape("offset", offset, x.shape[:2])


def affine_reference(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check_affine(x, gain, offset)
    u = x.to(wide(x.dtype))
    y = u * gain.to(u.dtype)[:, :, None, None] + offset.to(u.dtype)[:, :, None, None]
    return nhwc(y.clamp(0, 1).to(x.dtype))


def affine_fake(x: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check_affine(x, gain, offset)
    return empty_nhwc(x, tuple(x.shape))


def affine_cost(x: Tensor, gain: Tensor, offset: Tensor) -> Cost:
    """FLOPs: 2 per element; bytes of every tensor once."""
    return Cost(2 * x.numel(), size(x, gain, offset) + x.numel() * x.element_size())


def _check_wavelet(x: Tensor, style: Tensor) -> None:
    check_rank("x", x, "N,C,H,W")
    check_shape("style", style, x.shape)


def wavelet_reference(x: Tensor, style: Tensor) -> Tensor:
    """Plain PyTorch, in float32 or wider; x and style [N,C,H,W] of one size.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    _check_wavelet(x, style)
    u = x.to(wide(x.dtype))
    low = style.to(u.dtype) - u
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=u.dtype, device=u.device)
    for level in range(WAVELET_LEVELS):
        low = _blur(low, taps, 2**level)
    return nhwc((u + low).clamp(0, 1).to(x.dtype))


def _blur(x: Tensor, taps: Tensor, dilation: int) -> Tensor:
    """One separable blur of dilated [1,2,1]/4 per axis with replicate padding."""
    c = x.shape[1]
    row = taps.view(1, 1, 1, 3).expand(c, 1, 1, 3)
    column = taps.view(1, 1, 3, 1).expand(c, 1, 3, 1)
    x = F.pad(x, (dilation,) * 4, mode="replicate")
    x = F.conv2d(x, row, groups=c, dilation=dilation)
    return F.conv2d(x, column, groups=c, dilation=dilation)


def wavelet_fake(x: Tensor, style: Tensor) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    _check_wavelet(x, style)
    return empty_nhwc(x, tuple(x.shape))


def wavelet_cost(x: Tensor, style: Tensor) -> Cost:
    """FLOPs: 5 levels of 2 x 3 taps, the difference and the sum; bytes of every tensor once."""
    return Cost(x.numel() * (WAVELET_LEVELS * 12 + 2), size(x, style) + x.numel() * x.element_size())


channel_stats = register(STATS_SCHEMA, stats_reference, stats_fake, stats_cost)
affine_clamp = register(AFFINE_SCHEMA, affine_reference, affine_fake, affine_cost)
wavelet_fix = register(WAVELET_SCHEMA, wavelet_reference, wavelet_fake, wavelet_cost)
