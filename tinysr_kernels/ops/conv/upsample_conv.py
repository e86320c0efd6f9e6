"""upsample_conv: nearest x2 upsampling followed by a dense 3x3 convolution, computed at the low resolution.

A 3x3 kernel over a nearest-upsampled image covers, for each of the four output phases (a, b) in {0,1}^2, only 2x2
distinct input pixels. Per axis the taps (w0, w1, w2) become (w0, w1+w2) for phase 0, which reads pixels (y-1, y), and
(w0+w1, w2) for phase 1, which reads (y, y+1). With zero padding the identity is exact, and the four 2x2 convolutions
take 16 multiplications per input pixel and channel pair instead of 36.

    out[n,o,2y+a,2x+b] = act(bias[o] + sum_{c,i,j} phases[2a+b,o,c,i,j] * x[n,c, y+a+i-1, x+b+j-1])

Layouts: x [N,C,H,W] in channels_last memory, phases [4,O,C,2,2] with the channels last in memory (see `phase_weights`),
bias [O], out [N,O,2H,2W] in channels_last memory. `upsample_conv_norm` also returns the GroupNorm of the result
(`conv_norm.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.plan import Library, Plan, next_power_of_2
from tinysr_kernels.ops.call import Cost, register
from tinysr_kernels.ops.checks import check_epilogue, check_rank, check_shape
from tinysr_kernels.ops.conv import implicit_gemm
from tinysr_kernels.ops.conv.conv_norm import NormAfter
from tinysr_kernels.ops.conv.implicit_gemm import Config, Convolution
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, empty_nhwc, nbytes, nhwc, widest_dtype
from tinysr_kernels.ops.library_math import conv2d
from tinysr_kernels.ops.reference_math import compute_dtype, epilogue


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


@register
@dataclass(slots=True, eq=False)
class UpsampleConv(Convolution):
    """One upsampling and convolution; fields and mathematics as in the module's docstring."""

    name = "upsample_conv"
    tuned_by: ClassVar[tuple[str, ...]] = ("x", "phases")
    scale = 2

    x: Tensor
    phases: Tensor
    bias: Tensor | None = None
    activation: str = "none"

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N,O,2H,2W] of the result."""
        n, _, h, w = self.x.shape
        return n, self.phases.shape[1], 2 * h, 2 * w

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("x", self.x, "N,C,H,W")
        check_rank("phases", self.phases, "4,O,C,2,2")
        check_shape("phases", self.phases, (4, self.phases.shape[1], self.x.shape[1], 2, 2))
        check_epilogue(self.out_shape, self.bias, None, self.activation)

    def reference(self) -> Any:
        """Plain PyTorch, in float32 or wider."""
        u = nhwc(self.x.to(compute_dtype(self.x.dtype)))
        h, w = self.x.shape[2:]
        o = self.phases.shape[1]
        # All phases in one convolution, with one row and one column more than each phase needs.
        y = conv2d(u, nhwc(self.phases.to(u.dtype).flatten(0, 1)), padding=1)
        out = empty_nhwc(u, self.out_shape)
        for a in (0, 1):
            for b in (0, 1):
                phase = y[:, (2 * a + b) * o :][:, :o]
                out[:, :, a::2, b::2] = phase[:, :, a : a + h, b : b + w]
        return epilogue(out, self.bias, None, self.activation, True, self.x.dtype)

    def library(self) -> Any:
        """All phases as one convolution by the library, then their interleaving."""
        out = empty_nhwc(self.x, self.out_shape)
        phases = nhwc(conv2d(nhwc(self.x), self._kernel(), padding=1))
        _interleave(phases, None if self.bias is None else self.bias.to(out.dtype), self.activation, out)
        return out

    def _kernel(self) -> Tensor:
        """The phases as one kernel [4*O,C,2,2] in channels_last memory, in x's dtype: no copy of what networks hold."""
        _, o, c, _, _ = self.phases.shape
        return nhwc(_channels_last(self.phases.to(self.x.dtype)).view(4 * o, 2, 2, c).permute(0, 3, 1, 2))

    def cost(self) -> Cost:
        """FLOPs of the four 2x2 convolutions; bytes of every tensor once."""
        n, c, h, w = self.x.shape
        o = self.phases.shape[1]
        return Cost(2 * 16 * n * h * w * c * o, nbytes(*self.tensors) + 4 * n * o * h * w * self.x.element_size())

    def bucket(self) -> str:
        """dtype, channels, pixels of x per sample up to a power of two."""
        c, h, w = self.x.shape[1:]
        return f"{dtype_name(self.x)} {c}->{self.phases.shape[1]} {next_power_of_2(h * w)}"

    def plan(self, config: Config) -> Plan:
        """The launches."""
        out = empty_nhwc(self.x, self.out_shape)
        if config.form == "library":
            return Plan(out, self._library(out))
        weight = _channels_last(self.phases.to(widest_dtype(self.x, self.phases)))
        return Plan(out, implicit_gemm.launches(config, self, weight, out))

    def _library(self, out: Tensor) -> tuple[Library, ...]:
        """All four phases as one convolution with 4*O outputs on one pixel more per axis, then their interleaving."""
        n, _, h, w = self.x.shape
        o = self.phases.shape[1]
        phases = empty_nhwc(self.x, (n, 4 * o, h + 1, w + 1))
        arguments = {"x": nhwc(self.x), "weight": self._kernel(), "stride": 1, "padding": 1, "out": phases}
        step = {
            "scratch_phases": phases,
            "bias": contiguous_as(self.bias),
            "activation": self.activation,
            "out": out,
        }
        interleave = Library(_interleave, step, 1 if self.activation == "none" else 2)
        return Library(implicit_gemm.convolve, arguments), interleave


def _channels_last(phases: Tensor) -> Tensor:
    """[4,O,C,2,2] -> [4,O,2,2,C], contiguous: no copy of what networks hold."""
    return phases.permute(0, 1, 3, 4, 2).contiguous()


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


@register
@dataclass(eq=False)
class UpsampleConvNorm(NormAfter, UpsampleConv):
    """The same, and the GroupNorm of the result."""

    name = "upsample_conv_norm"
    tuned_by = (*UpsampleConv.tuned_by, *NormAfter.tuned_by)
