"""upsample_conv: nearest x2 enlargement followed by a dense 3x3 convolution, computed at the low resolution.

A 3x3 kernel over a nearest-enlarged image meets, for each of the four output phases (a, b) in {0,1}^2, only
2x2 distinct input pixels. Per axis the taps (w0, w1, w2) become (w0, w1+w2) for phase 0, which reads pixels
(y-1, y), and (w0+w1, w2) for phase 1, which reads (y, y+1). With zero padding the identity is exact, and the
four 2x2 convolutions take 16 multiplications per input pixel and channel pair instead of 36.

    out[n,o,2y+a,2x+b] = act(bias[o] + sum_{c,i,j} phases[2a+b,o,c,i,j] * x[n,c, y+a+i-1, x+b+j-1])

Layouts: x [N,C,H,W] channels_last, phases [4,O,C,2,2] (see `phase_weights`), out [N,O,2H,2W] channels_last.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import (
    Cost,
    check_epilogue,
    check_rank,
    check_shape,
    empty_nhwc,
    finish,
    nhwc,
    register,
    size,
    wide,
)

SCHEMA = 'upsample_conv(Tensor x, Tensor phases, Tensor? bias=None, str activation="none") -> Tensor'


def phase_weights(weight: Tensor) -> Tensor:
    """[O,C,3,3] -> [4,O,C,2,2]: the four 2x2 kernels, that of phase (a, b) at index 2a+b.

    Sums in weight's own dtype. Raises ValueError for another kernel size.
    """
    check_rank("weight", weight, "O,C,3,3")
    check_shape("weight", weight, (*weight.shape[:2], 3, 3))
    rows = _fold_axis(weight, 2)
    return torch.stack([column for row in rows for column in _fold_axis(row, 3)])


def _fold_axis(weight: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    w0, w1, w2 = weight.unbind(axis)
    return torch.stack([w0, w1 + w2], axis), torch.stack([w0 + w1, w2], axis)


def _out_shape(x: Tensor, phases: Tensor, bias: Tensor | None, activation: str) -> tuple[int, int, int, int]:
    check_rank("x", x, "N,C,H,W")
    check_rank("phases", phases, "4,O,C,2,2")
    n, c, h, w = x.shape
    check_shape("phases", phases, (4, phases.shape[1], c, 2, 2))
    out = (n, phases.shape[1], 2 * h, 2 * w)
    check_epilogue(out, bias, None, activation)
    return out


def reference(x: Tensor, phases: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has x's. Raises ValueError naming argument, expected and found.
    """
    shape = _out_shape(x, phases, bias, activation)
    u = nhwc(x.to(wide(x.dtype)))
    h, w = x.shape[2:]
    out = empty_nhwc(u, shape)
    padded = nhwc(F.pad(u, (1, 1, 1, 1)))
    for a in (0, 1):
        for b in (0, 1):
            window = padded[:, :, a : a + h + 1, b : b + w + 1]
            out[:, :, a::2, b::2] = F.conv2d(window, nhwc(phases[2 * a + b].to(u.dtype)))
    return finish(out, bias, None, activation, True, x.dtype)


def fake(x: Tensor, phases: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return empty_nhwc(x, _out_shape(x, phases, bias, activation))


def cost(x: Tensor, phases: Tensor, bias: Tensor | None = None, activation: str = "none") -> Cost:
    """FLOPs of the four 2x2 convolutions; bytes of every tensor once."""
    n, c, h, w = x.shape
    o = phases.shape[1]
    return Cost(2 * 16 * n * h * w * c * o, size(x, phases, bias) + 4 * n * o * h * w * x.element_size())


upsample_conv = register(SCHEMA, reference, fake, cost)
