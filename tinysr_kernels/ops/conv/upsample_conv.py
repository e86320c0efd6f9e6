"""upsample_conv: nearest x2 enlargement followed by a dense 3x3 convolution, computed at the low resolution.

A 3x3 kernel over a nearest-enlarged image meets, for each of the four output phases (a, b) in {0,1}^2, only
2x2 distinct input pixels. Per axis the taps (w0, w1, w2) become (w0, w1+w2) for phase 0, which reads pixels
(y-1, y), and (w0+w1, w2) for phase 1, which reads (y, y+1). With zero padding the identity is exact, and the
four 2x2 convolutions take 16 multiplications per input pixel and channel pair instead of 36.

    out[n,o,2y+a,2x+b] = act(bias[o] + sum_{c,i,j} phases[2a+b,o,c,i,j] * x[n,c, y+a+i-1, x+b+j-1])

Layouts: x [N,C,H,W] channels_last, phases [4,O,C,2,2] with the channels last in memory (see `phase_weights`), out
[N,O,2H,2W] channels_last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Library, Plan, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check_epilogue, check_rank, check_shape
from tinysr_kernels.ops.conv import conv_tiles
from tinysr_kernels.ops.conv.conv_norm import register_with_norm
from tinysr_kernels.ops.conv.conv_tiles import Config
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype, epilogue
from tinysr_kernels.ops.registry import Implementation, register

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
    u = nhwc(x.to(compute_dtype(x.dtype)))
    h, w = x.shape[2:]
    # All phases at once: one row and one column more than each of them needs, on sides of its own.
    y = F.conv2d(u, nhwc(phases.to(u.dtype).flatten(0, 1)), padding=1)
    out = empty_nhwc(u, shape)
    for a in (0, 1):
        for b in (0, 1):
            phase = y[:, (2 * a + b) * shape[1] :][:, : shape[1]]
            out[:, :, a::2, b::2] = phase[:, :, a : a + h, b : b + w]
    return epilogue(out, bias, None, activation, True, x.dtype)


def fake(x: Tensor, phases: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return empty_nhwc(x, _out_shape(x, phases, bias, activation))


def cost(x: Tensor, phases: Tensor, bias: Tensor | None = None, activation: str = "none") -> Cost:
    """FLOPs of the four 2x2 convolutions; bytes of every tensor once."""
    n, c, h, w = x.shape
    o = phases.shape[1]
    return Cost(2 * 16 * n * h * w * c * o, nbytes(x, phases, bias) + 4 * n * o * h * w * x.element_size())


def bucket(x: Tensor, phases: Tensor, **_: Any) -> str:
    """Calls that share a configuration, whatever the batch: dtype, channels, pixels of x up to a power of two."""
    c, h, w = x.shape[1:]
    return f"{str(x.dtype).removeprefix('torch.')} {c}->{phases.shape[1]} {next_power_of_2(h * w)}"


def heuristic(gpu: Gpu, x: Tensor, phases: Tensor, **_: Any) -> Config:
    """Our own kernel, whatever the batch."""
    c, h, w = x.shape[1:]
    return conv_tiles.heuristic(gpu, h, w, phases.shape[1], [c], x.element_size(), 4)


def plan(config: Config, x: Tensor, phases: Tensor, bias: Tensor | None, activation: str) -> Plan:
    """The launches; raises what the reference raises. Inputs that are not dense in their layout are copied once."""
    out = empty_nhwc(x, _out_shape(x, phases, bias, activation))
    bias = None if bias is None else contiguous_as(bias, bias.dtype)
    if config.form == "library":
        return Plan(out, _library(x, phases, bias, activation, out))
    dtype = torch.promote_types(x.dtype, phases.dtype)
    arguments = {
        "x": nhwc(x),
        "weight": _channels_last(phases.to(dtype)),
        "shortcut": None,
        "skip": None,
        "shortcut_weight": None,
    }
    tail = conv_tiles.Tail(bias, None, activation, True)
    return Plan(out, conv_tiles.launches(config, arguments, tail, out, enlarge=2))


def _channels_last(phases: Tensor) -> Tensor:
    """[4,O,C,2,2] -> [4,O,2,2,C], contiguous: no copy of what networks hold."""
    return phases.permute(0, 1, 3, 4, 2).contiguous()


def _library(x: Tensor, phases: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> tuple[Library, ...]:
    """All four phases as one convolution with 4*O outputs on a pixel more each way, then their interleaving."""
    n, c, h, w = x.shape
    o = phases.shape[1]
    wide_out = empty_nhwc(x, (n, 4 * o, h + 1, w + 1))
    kernel = nhwc(_channels_last(phases.to(x.dtype)).view(4 * o, 2, 2, c).permute(0, 3, 1, 2))
    arguments = {"x": nhwc(x), "weight": kernel, "stride": 1, "padding": 1, "out": wide_out}
    step = {"scratch_phases": wide_out, "bias": bias, "activation": activation, "out": out}
    return Library(conv_tiles.convolve, arguments), Library(_interleave, step, 1 if activation == "none" else 2)


def _interleave(scratch_phases: Tensor, bias: Tensor | None, activation: str, out: Tensor) -> None:
    """out[n,o,2y+a,2x+b] = act(scratch_phases[n,(2a+b)*O+o,y+a,x+b] + bias[o])."""
    n, o, h, w = out.shape
    # Phase (a, b) begins a rows and b columns further on, so that all of them are one view [N,H,2,W,2,O].
    step, row = 4 * o, 4 * o * (w // 2 + 1)
    strides = (row * (h // 2 + 1), row, row + 2 * o, step, step + o, 1)
    v = scratch_phases.as_strided((n, h // 2, 2, w // 2, 2, o), strides)
    result = out.permute(0, 2, 3, 1).view(n, h // 2, 2, w // 2, 2, o)
    if bias is None:
        result.copy_(v)
    else:
        torch.add(v, bias, out=result)
    if activation == "relu":
        result.relu_()
    elif activation == "silu":
        F.silu(result, inplace=True)


def space(gpu: Gpu, x: Tensor, phases: Tensor, **_: Any) -> Iterator[Config]:
    """Tiles around the heuristic's and the library."""
    c, h, w = x.shape[1:]
    return conv_tiles.space(gpu, h, w, phases.shape[1], [c], x.element_size(), 4)


KERNELS = Implementation(
    Config, bucket, heuristic, plan, space, (conv3x3_kernel.__name__, conv_tiles.__name__, device_functions.__name__)
)

upsample_conv = register(SCHEMA, reference, fake, cost, KERNELS)
upsample_conv_norm = register_with_norm(upsample_conv, SCHEMA, fake)
