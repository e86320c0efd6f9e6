"""input_conv: the first convolution of a network, on the image itself, with a constant border.

    out[n,o,y,x] = bias[o] + sum_{c,i,j} weight[o,c,i,j] * p[n,c, s*y+i, s*x+j]

p is x surrounded by `padding` pixels of value `border`. PixelUnshuffle(r) followed by a 3x3 convolution is the 3r x 3r
convolution of stride r and padding r. A network that wants 2u-1 of an image u in [0,1] has this map folded into weight
and bias; its zero padding is then the border value 0.5 of u.

Layouts: x [N,C,H,W] of any strides, of any floating dtype or uint8, which holds 255 times the image; weight [O,C,K,K];
bias [O]; out [N,O,(H+2p-K)/s+1,(W+2p-K)/s+1] in channels_last memory, of the weight's dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.conv.kernels import input_conv as input_conv_kernel
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.library_math import conv2d
from tinysr_kernels.ops.reference_math import compute_dtype, epilogue


@dataclass(frozen=True)
class Config:
    """A launch of input_conv: output pixels and channels per program, reduction per step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


@register
@dataclass(slots=True, eq=False)
class InputConv(Operator):
    """One convolution of an image; fields and mathematics as in the module's docstring."""

    name = "input_conv"
    config = Config
    tuned_by = ("x", "weight", "stride", "padding")

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: int = 1
    border: float = 0.0

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N,O,H',W'] of the result."""
        n, _, h, w = self.x.shape
        o, _, k, _ = self.weight.shape
        return n, o, (h + 2 * self.padding - k) // self.stride + 1, (w + 2 * self.padding - k) // self.stride + 1

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("x", self.x, "N,C,H,W")
        check_rank("weight", self.weight, "O,C,K,K")
        c, h, w = self.x.shape[1:]
        o, _, k, _ = self.weight.shape
        check_shape("weight", self.weight, (o, c, k, k))
        check_shape("bias", self.bias, (o,))
        check(self.stride >= 1, f"stride must be at least 1, found {self.stride}")
        check(self.padding >= 0, f"padding must be at least 0, found {self.padding}")
        smallest = k - 2 * self.padding
        check(min(h, w) >= smallest, f"x must be at least {smallest} pixels per side, found {h}x{w}")

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider, of the image rounded to the weight's dtype."""
        dtype = compute_dtype(self.weight.dtype)
        if self.x.dtype == torch.uint8:
            u = self.x.to(dtype) / 255
        else:
            u = self.x.to(self.weight.dtype).to(dtype)
        u = F.pad(u, (self.padding,) * 4, value=self.border)
        y = conv2d(nhwc(u), nhwc(self.weight.to(dtype)), stride=self.stride)
        return epilogue(y, self.bias, None, "none", True, self.weight.dtype)

    def library(self) -> Tensor:
        """The library's convolution of the image rounded to the weight's dtype."""
        dtype, padding = self.weight.dtype, self.padding
        u = (self.x.float() / 255 if self.x.dtype == torch.uint8 else self.x).to(dtype)
        if self.border != 0.0:
            u, padding = F.pad(u, (padding,) * 4, value=self.border), 0
        return nhwc(conv2d(nhwc(u), nhwc(self.weight), self.bias, stride=self.stride, padding=padding))

    def empty(self) -> Tensor:
        """[N,O,H',W'] in channels_last memory, of the weight's dtype."""
        return empty_nhwc(self.x, self.out_shape, self.weight.dtype)

    def cost(self) -> Cost:
        """FLOPs of the convolution; bytes of every tensor once."""
        n, o, h, w = self.out_shape
        moved = nbytes(*self.tensors) + n * o * h * w * self.weight.element_size()
        return Cost(2 * n * h * w * self.weight.numel(), moved)

    def bucket(self) -> str:
        """dtypes, shape of the weight, stride, output pixels per sample up to a power of two."""
        _, o, h, w = self.out_shape
        kernel = f"{self.x.shape[1]}x{self.weight.shape[2]}x{self.weight.shape[2]}->{o} s{self.stride}"
        return f"{dtype_name(self.x)}->{dtype_name(self.weight)} {kernel} {next_power_of_2(h * w)}"

    def heuristic(self, gpu: Gpu) -> Config:
        """The reduction over a patch is short: the store of the result takes the time."""
        block_n = next_power_of_2(self.weight.shape[0], most=64)
        half = self.weight.element_size() == 2
        block_k = next_power_of_2(self.weight[0].numel(), most=32 if half else 16)
        return Config(64 if half else 32, block_n, block_k, 4)

    def plan(self, config: Config) -> Plan:
        """One launch, which reads x with its own strides."""
        out = self.empty()
        n, o, h, w = out.shape
        sample_stride, channel_stride, row_stride, column_stride = self.x.stride()
        arguments = {
            "x": self.x,
            "weight": nhwc(self.weight),
            "bias": contiguous_as(self.bias),
            "out": out,
            "border": float(self.border),
            "height": self.x.shape[2],
            "width": self.x.shape[3],
            "out_height": h,
            "out_width": w,
            "out_channels": o,
            "sample_stride": sample_stride,
            "channel_stride": channel_stride,
            "row_stride": row_stride,
            "column_stride": column_stride,
            "STRIDE": self.stride,
            "PADDING": self.padding,
            "CHANNELS": self.x.shape[1],
            "KERNEL_SIZE": self.weight.shape[2],
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
        }
        grid = (cdiv(h * w, config.block_m), cdiv(o, config.block_n), n)
        return Plan(out, (Launch(input_conv_kernel.convolve, grid, arguments, config.num_warps, 1),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """Tiles around the heuristic's."""
        steps = (16, 32, 64) if self.weight.element_size() == 2 else (16,)
        for block_m, most, block_k, num_warps in itertools.product((32, 64, 128), (32, 64, 128), steps, (2, 4, 8)):
            if block_m * most <= 2048 * num_warps:
                yield Config(block_m, next_power_of_2(self.weight.shape[0], most=most), block_k, num_warps)
