"""conv3x3: a dense 3x3 convolution with its epilogue, and a 1x1 shortcut as a further part of its reduction.

    v[n,o,y,x] = sum_{c,i,j} weight[o,c,i,j] * x[n,c, s*y+i-1, s*x+j-1]
               + sum_k shortcut_weight[o,k] * concat(shortcut, skip)[n,k,y,x]
    out        = act(v + bias + residual)   or   act(v + bias) + residual

Prologue: with norm_moments, mean and biased variance of every channel of x [N,2,C], SiLU(GroupNorm(x)) takes the place
of x (`ops/norm/group_norm.py`; norm_weight and norm_bias [C]). An implicit GEMM evaluates it again for every tap, so
that a norm in a launch of its own is usually faster; `conv_few.py`, for few outputs, evaluates each pixel once. The
zero padding of one pixel follows the norm.

one_sided, with stride 2 alone: the zero padding is on the right and the bottom only, so that taps read s*y+i, s*x+j.

Layouts: activations [N,C,H,W] and weight [O,C,3,3], both in channels_last memory, bias [O]; shortcut [N,C1,H',W'],
skip [N,C2,H',W'] or None, shortcut_weight [O,C1+C2]. `conv3x3_moments` also returns the channel statistics of the
result (`ops/norm/channel_moments.py`), `conv3x3_norm` the GroupNorm of the result (`conv_norm.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu, gpu_of
from tinysr_kernels.launch.plan import Launch, Library, Plan, next_power_of_2
from tinysr_kernels.ops.call import Cost, register
from tinysr_kernels.ops.checks import (
    check,
    check_choice,
    check_epilogue,
    check_rank,
    check_shape,
    check_shortcut,
    check_together,
)
from tinysr_kernels.ops.conv import conv_few, implicit_gemm
from tinysr_kernels.ops.conv.conv_norm import NormAfter
from tinysr_kernels.ops.conv.implicit_gemm import Config, Convolution
from tinysr_kernels.ops.layout import as_rows, dtype_name, empty_nhwc, nbytes, nhwc, widest_dtype
from tinysr_kernels.ops.library_math import add_1x1, conv2d
from tinysr_kernels.ops.norm.channel_moments import ChannelMoments
from tinysr_kernels.ops.norm.group_norm import GroupNorm
from tinysr_kernels.ops.reference_math import add_shortcut_1x1, compute_dtype, epilogue


@register
@dataclass(slots=True, eq=False)
class Conv3x3(Convolution):
    """One dense convolution; fields and mathematics as in the module's docstring."""

    name = "conv3x3"
    tuned_by: ClassVar[tuple[str, ...]] = ("x", "weight", "shortcut", "skip", "stride", "norm_moments", "one_sided")

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    shortcut: Tensor | None = None
    skip: Tensor | None = None
    shortcut_weight: Tensor | None = None
    stride: int = 1
    activation: str = "none"
    activate_residual: bool = True
    norm_moments: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_groups: int = 1
    norm_eps: float = 1e-5
    one_sided: bool = False

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N,O,H',W'] of the result."""
        n, _, h, w = self.x.shape
        lost = 2 if self.one_sided else 1
        return n, self.weight.shape[0], (h - lost) // self.stride + 1, (w - lost) // self.stride + 1

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("x", self.x, "N,C,H,W")
        n, c = self.x.shape[:2]
        check_rank("weight", self.weight, "O,C,3,3")
        check_shape("weight", self.weight, (self.weight.shape[0], c, 3, 3))
        check_choice("stride", self.stride, (1, 2))
        if self.one_sided:
            check(self.stride == 2, f"one_sided needs stride 2, found {self.stride}")
            check(min(self.x.shape[2:]) >= 2, f"one_sided needs 2 pixels per side, found {list(self.x.shape[2:])}")
        check_epilogue(self.out_shape, self.bias, self.residual, self.activation)
        check_shortcut(self.out_shape, self.shortcut, self.skip, self.shortcut_weight)
        check_together(norm_moments=self.norm_moments, norm_weight=self.norm_weight, norm_bias=self.norm_bias)
        check_shape("norm_moments", self.norm_moments, (n, 2, c))
        check_shape("norm_weight", self.norm_weight, (c,))
        check_shape("norm_bias", self.norm_bias, (c,))
        groups = self.norm_groups
        check(groups > 0 and c % groups == 0, f"norm_groups must divide {c} channels, found {groups}")

    def norm_before(self, x: Tensor) -> GroupNorm | None:
        """The GroupNorm before the convolution, of x, or None."""
        if self.norm_weight is None or self.norm_bias is None:
            return None
        norm = (self.norm_weight, self.norm_bias, self.norm_groups, self.norm_eps)
        return GroupNorm(x, None, *norm, silu=True, moments=self.norm_moments)

    def reference(self) -> Any:
        """Plain PyTorch, in float32 or wider."""
        u = nhwc(self.x.to(compute_dtype(self.x.dtype)))
        norm = self.norm_before(u)
        if norm is not None:
            u = norm.reference()
        y = self._convolved(u, None)
        y = add_shortcut_1x1(y, self.shortcut, self.skip, self.shortcut_weight)
        return epilogue(y, self.bias, self.residual, self.activation, self.activate_residual, self.x.dtype)

    def _convolved(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The library's convolution of x, in its dtype."""
        weight = nhwc(self.weight.to(x.dtype))
        if self.one_sided:
            return conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
        return conv2d(x, weight, bias, stride=self.stride, padding=1)

    def library(self) -> Any:
        """The norm, the library's convolution, a GEMM per shortcut, and the epilogue in place."""
        norm = self.norm_before(self.x)
        x = nhwc(self.x) if norm is None else norm.library()
        y = nhwc(self._convolved(x, self.bias))
        y = add_1x1(y, self.shortcut, self.skip, self.shortcut_weight)
        return epilogue(y, None, self.residual, self.activation, self.activate_residual, x.dtype)

    def cost(self) -> Cost:
        """FLOPs of convolution and shortcut, 6 per element of x for a norm prologue; bytes of every tensor once."""
        n, o, h, w = self.out_shape
        k = 0 if self.shortcut_weight is None else self.shortcut_weight.shape[1]
        flops = 2 * n * h * w * o * (9 * self.x.shape[1] + k)
        if self.norm_moments is not None:
            flops += 6 * self.x.numel()
        return Cost(flops, nbytes(*self.tensors) + n * o * h * w * self.x.element_size())

    def bucket(self) -> str:
        """dtype, channels, output pixels per sample up to a power of two, stride, variant."""
        _, o, h, w = self.out_shape
        variant = ("" if self.shortcut is None else "+1x1") + ("" if self.norm_moments is None else " normed")
        side = " one-sided" if self.one_sided else ""
        return f"{dtype_name(self.x)} {self.x.shape[1]}->{o} {next_power_of_2(h * w)} s{self.stride}{side}{variant}"

    def heuristic(self, gpu: Gpu) -> Any:
        """An implicit GEMM, or `conv_few` where its loads would be narrow; independent of the batch size."""
        wide = self.x.element_size() == 2 and self.x.shape[1] % 8 == 0
        few = conv_few.applies(self) and not wide
        return conv_few.heuristic(self) if few else implicit_gemm.heuristic(gpu, self)

    def plan(self, config: Config) -> Plan:
        """The launches. ValueError for the form "few" where it does not apply."""
        out = empty_nhwc(self.x, self.out_shape)
        if config.form == "library":
            return Plan(out, self._library(out))
        weight = nhwc(self.weight.to(widest_dtype(self.x, self.weight, self.shortcut, self.skip)))
        if config.form == "few":
            found = f"{out.shape[1]}, stride {self.stride}"
            check(conv_few.applies(self), f"few needs at most {conv_few.MAX_OUTPUTS} outputs, found {found}")
            return Plan(out, (conv_few.launch(config, self, weight, out),))
        return_moments = isinstance(self, ChannelMoments)
        return Plan(out, implicit_gemm.launches(config, self, weight, out, return_moments=return_moments))

    def _library(self, out: Tensor) -> tuple[Launch | Library, ...]:
        """The library's convolution and GEMMs in the dtype of x, then our epilogue in place."""
        x, dtype = self.x, self.x.dtype
        steps: list[Launch | Library] = []
        norm = self.norm_before(x)
        if norm is not None:
            before = norm.plan(norm.heuristic(gpu_of(x)))
            x, steps = before.result, [*before.launches]
        arguments = {
            "x": nhwc(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x),
            "weight": nhwc(self.weight.to(dtype)),
            "stride": self.stride,
            "padding": 0 if self.one_sided else 1,
            "out": out,
        }
        steps.append(Library(implicit_gemm.convolve, arguments))
        begin = 0
        for t in (self.shortcut, self.skip):
            if t is not None and self.shortcut_weight is not None:
                weight = self.shortcut_weight[:, begin : begin + t.shape[1]].to(dtype)
                steps.append(Library(_add_1x1, {"x": nhwc(t.to(dtype)), "weight": weight, "out": out}))
                begin += t.shape[1]
        return (*steps, *implicit_gemm.epilogue(out, self, out))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """`conv_few.space` where it applies, and `implicit_gemm.space`."""
        if conv_few.applies(self):
            yield from conv_few.space(self)
        yield from implicit_gemm.space(gpu, self)


def _add_1x1(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out += weight @ x over channels: x [N,C,H,W], weight [O,C], out [N,O,H,W], images in channels_last memory."""
    rows = as_rows(out)
    torch.addmm(rows, as_rows(x), weight.T, out=rows)


@register
class Conv3x3Moments(ChannelMoments, Conv3x3):
    """The same, and the channel statistics of the result."""

    __slots__ = ()
    name = "conv3x3_moments"


@register
@dataclass(eq=False)
class Conv3x3Norm(NormAfter, Conv3x3):
    """The same, and the GroupNorm of the result."""

    name = "conv3x3_norm"
    tuned_by = (*Conv3x3.tuned_by, *NormAfter.tuned_by)
