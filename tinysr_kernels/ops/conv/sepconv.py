"""sepconv: a depthwise 3x3 and a pointwise 1x1 convolution in one operator; the depthwise result is never stored.

    u = x, or x upsampled nearest x2
    d[n,c,y,x] = sum_{i,j} depthwise[c,i,j] * u[n,c, s*y+i-1, s*x+j-1]
    v[n,o,y,x] = sum_c pointwise[o,c] * d[n,c,y,x]
               + sum_k shortcut_weight[o,k] * concat(shortcut, skip)[n,k,y,x]
    out        = act(v + bias + residual)   or   act(v + bias) + residual

Zero padding of one pixel. Layouts: activations [N,C,H,W] in channels_last memory, depthwise [C,3,3] with the channels
last in memory, pointwise [O,C], bias [O]; shortcut [N,C1,H',W'], skip [N,C2,H',W'] or None, shortcut_weight [O,C1+C2].
`sepconv_moments` also returns the channel statistics of the result (`ops/norm/channel_moments.py`).

The separable convolutions are those of TinySR's VAE (arXiv 2508.17434, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Plan, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check_choice, check_epilogue, check_rank, check_shape, check_shortcut
from tinysr_kernels.ops.conv import sepconv_tiles
from tinysr_kernels.ops.conv.sepconv_tiles import Config
from tinysr_kernels.ops.layout import as_rows, contiguous_as, dtype_name, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.norm.channel_moments import ChannelMoments
from tinysr_kernels.ops.reference_math import add_shortcut_1x1, compute_dtype, epilogue, matmul


@register
@dataclass(slots=True, eq=False)
class SepConv(Operator):
    """One separable convolution; fields and mathematics as in the module's docstring."""

    name = "sepconv"
    config = Config
    tuned_by = ("x", "pointwise", "shortcut", "stride", "upsample")

    x: Tensor
    depthwise: Tensor
    pointwise: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    shortcut: Tensor | None = None
    skip: Tensor | None = None
    shortcut_weight: Tensor | None = None
    stride: int = 1
    upsample: bool = False
    activation: str = "none"
    activate_residual: bool = True

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N,O,H',W'] of the result."""
        n, _, h, w = self.x.shape
        if self.upsample:
            h, w = 2 * h, 2 * w
        return n, self.pointwise.shape[0], (h - 1) // self.stride + 1, (w - 1) // self.stride + 1

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("x", self.x, "N,C,H,W")
        c = self.x.shape[1]
        check_shape("depthwise", self.depthwise, (c, 3, 3))
        check_rank("pointwise", self.pointwise, "O,C")
        check_shape("pointwise", self.pointwise, (self.pointwise.shape[0], c))
        check_choice("stride", self.stride, (1, 2))
        check_epilogue(self.out_shape, self.bias, self.residual, self.activation)
        check_shortcut(self.out_shape, self.shortcut, self.skip, self.shortcut_weight)

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider."""
        u = nhwc(self.x.to(compute_dtype(self.x.dtype)))
        if self.upsample:
            u = F.interpolate(u, scale_factor=2, mode="nearest")
        taps = contiguous_as(self.depthwise, u.dtype)[:, None]
        d = F.conv2d(u, taps, stride=self.stride, padding=1, groups=u.shape[1])
        y = matmul(as_rows(nhwc(d)), contiguous_as(self.pointwise, u.dtype))
        y = y.view(d.shape[0], *d.shape[2:], -1).permute(0, 3, 1, 2)
        y = add_shortcut_1x1(y, self.shortcut, self.skip, self.shortcut_weight)
        return epilogue(y, self.bias, self.residual, self.activation, self.activate_residual, self.x.dtype)

    def empty(self) -> Tensor:
        """[N,O,H',W'] in channels_last memory, of x's dtype."""
        return empty_nhwc(self.x, self.out_shape)

    def cost(self) -> Cost:
        """FLOPs of the two convolutions and the shortcut; bytes of every tensor once."""
        n, o, h, w = self.out_shape
        k = 0 if self.shortcut_weight is None else self.shortcut_weight.shape[1]
        c = self.x.shape[1]
        return Cost(
            2 * n * h * w * (9 * c + o * (c + k)), nbytes(*self.tensors) + n * o * h * w * self.x.element_size()
        )

    def bucket(self) -> str:
        """dtype, channels, output pixels up to a power of two, variant."""
        n, o, h, w = self.out_shape
        variant = f"{'up' if self.upsample else f's{self.stride}'}{'' if self.shortcut is None else '+1x1'}"
        return f"{dtype_name(self.x)} {self.x.shape[1]}->{o} {next_power_of_2(n * h * w)} {variant}"

    def heuristic(self, gpu: Gpu) -> Config:
        """`sepconv_tiles.heuristic` for the shape of the result."""
        return sepconv_tiles.heuristic(gpu, self.x.shape[1], self.out_shape, self.x.element_size())

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out = empty_nhwc(self.x, self.out_shape)
        launch = sepconv_tiles.launch(config, self, out, return_moments=isinstance(self, ChannelMoments))
        return Plan(out, (launch,))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """`sepconv_tiles.space` for the shape of the result."""
        return sepconv_tiles.space(self.x.shape[1], self.out_shape)


@register
class SepConvMoments(ChannelMoments, SepConv):
    """The same, and the channel statistics of the result."""

    __slots__ = ()
    name = "sepconv_moments"

    def heuristic(self, gpu: Gpu) -> Config:
        """For one sample, whatever the batch, so that a sample's statistics are merged in the same order in any.

        The statistics take registers too: threads hold fewer values, for 128 channels in single precision half as
        many, and for 4 warps of up to 64 channels a quarter.
        """
        found = sepconv_tiles.heuristic(gpu, self.x.shape[1], (1, *self.out_shape[1:]), self.x.element_size())
        if found.form == "march" and found.num_warps == 4 and found.block_k <= 64:
            # With few output channels, 8 warps would spill a register on sm_80 in Triton 3.6.
            few = self.x.element_size() == 2 and found.block_k == 64 and found.block_n < 64
            return replace(found, num_warps=4 if few else 8, block_m=max(found.block_m // 2, 16))
        if found.form == "march" and found.block_k == 128 and self.x.element_size() == 4:
            return replace(found, num_warps=16)
        return found
