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

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_choice, check_epilogue, check_rank, check_shape, check_shortcut
from tinysr_kernels.ops.conv.kernels import sepconv as kernels
from tinysr_kernels.ops.layout import as_rows, contiguous_as, dtype_name, empty_nhwc, nbytes, nhwc, widest_dtype
from tinysr_kernels.ops.library_math import add_1x1, conv2d
from tinysr_kernels.ops.norm.channel_moments import ChannelMoments, scratch
from tinysr_kernels.ops.reference_math import add_shortcut_1x1, compute_dtype, epilogue, matmul

MAX_ROWS = 32
"""Output rows per program of `march`, which reads two more than it writes: 1/16 more."""


@dataclass(frozen=True)
class Config:
    """A launch of sepconv. form: "march" (block_k covers all input channels) or "tile" (kernels/sepconv.py).

    rows (march only) and block_m: output rows and output pixels of a row per program ("tile": output pixels in reading
    order); block_k: input channels per step; block_n: output channels per program.
    """

    form: str
    rows: int
    block_m: int
    block_k: int
    block_n: int
    num_warps: int
    num_stages: int


def sepconv_heuristic(
    gpu: Gpu, channels: int, out_shape: tuple[int, int, int, int], itemsize: int, moments: bool = False
) -> Config:
    """`march` where a program's channels fit the registers of its warps, several programs per multiprocessor.

    A thread of `march` holds 16 values of a row, in vectors of 8 channels: three float32 accumulators each, 48
    registers, and 24 for the taps of one kernel column. 32 pixels of 64 channels are thus a program of 4 warps with 104
    to 144 registers: three or four per multiprocessor, with 12 to 16 KB of a row each in flight. On Hopper, whose wgmma
    takes 64 rows, it is 64 pixels for 8 warps with 112 to 116 registers, two programs and 16 KB; an H200 wants about
    11 KB in flight (2.2 TB/s of reads, 0.7 us, 132 multiprocessors), others less. All nine taps in registers take 72,
    hence 230 to 250 in all, one program of 8 warps and 8 KB. No pipeline stages: an asynchronous copy to shared memory
    bypasses the L1, and each of a row's three shifts ("tile": of nine) would come from the L2. `tile` takes 80 to 111
    registers with 8 warps, and all 255 with 4.
    """
    n, o, h, w = out_shape
    block_k = next_power_of_2(channels)
    block_n = next_power_of_2(o, most=64)
    if block_k > 128 or w < 16:
        if itemsize == 2 and channels % 8 == 0:
            # Two stages have the next step's nine taps under way: a third of the predicted time without, on an H200.
            return Config("tile", 1, 32, min(block_k, 32), block_n, 4, 2)
        # Steps of 32 channels would spill a few words at 64 and 80 registers.
        return Config("tile", 1, 32, min(block_k, 16), block_n, 8, 1)
    tile, num_warps, resident = 2048, 4, 3
    if channels % 8 or itemsize > 2:
        # Narrower vectors have more addresses, and a GEMM in float32 holds its operands in registers.
        tile, num_warps = 1024, 8 if block_k > 64 else 4
    elif gpu.capability[0] == 9 and block_k == 64 and not moments and n * h * cdiv(w, 64) < gpu.multiprocessors:
        tile = 1024  # the image is too small for one program of 64 pixels on every multiprocessor
    elif gpu.capability[0] == 9 and block_k <= 64 <= w:
        tile, num_warps, resident = 4096, 8, 2
    elif gpu.capability[0] == 9 and block_k > 64 and moments:
        resident = 2  # the statistics take the registers of the third
    block_m = next_power_of_2(min(tile // block_k, w), most=64)
    # One wave of programs, of few rows where the image is too small to fill it.
    across = n * cdiv(w, block_m) * cdiv(o, block_n)
    strips = max(resident * gpu.multiprocessors // across, 1)
    return Config("march", min(cdiv(h, strips), MAX_ROWS), block_m, block_k, block_n, num_warps, 1)


def sepconv_space(channels: int, out_shape: tuple[int, int, int, int]) -> Iterator[Config]:
    """Both forms, where march can hold the channels; tiles around the heuristic's, in more and fewer rows."""
    block_k, block_n = next_power_of_2(channels), next_power_of_2(out_shape[1], most=64)
    for block_m, num_warps in itertools.product((16, 32, 64), (4, 8)):
        if block_k <= 128:
            for rows in (2, 4, 8, 11, 16, 22, 32):
                yield Config("march", rows, block_m, block_k, block_n, num_warps, 1)
        for step, num_stages in itertools.product((16, 32, 64), (1, 2, 3)):
            yield Config("tile", 1, block_m, min(block_k, step), block_n, num_warps, num_stages)


def taps_last(depthwise: Tensor) -> Tensor:
    """[C,3,3] -> [3,3,C], contiguous: no copy of what networks hold."""
    return depthwise.movedim(0, -1).contiguous()


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
        d = conv2d(u, taps, stride=self.stride, padding=1, groups=u.shape[1])
        y = matmul(as_rows(nhwc(d)), contiguous_as(self.pointwise, u.dtype))
        y = y.view(d.shape[0], *d.shape[2:], -1).permute(0, 3, 1, 2)
        y = add_shortcut_1x1(y, self.shortcut, self.skip, self.shortcut_weight)
        return epilogue(y, self.bias, self.residual, self.activation, self.activate_residual, self.x.dtype)

    def library(self) -> Tensor:
        """The library's depthwise convolution, a GEMM over pixels with its bias, one per shortcut, the epilogue."""
        x, dtype = nhwc(self.x), self.x.dtype
        if self.upsample:
            x = nhwc(F.interpolate(x, scale_factor=2, mode="nearest"))
        taps = contiguous_as(self.depthwise, dtype)[:, None]
        d = nhwc(conv2d(x, taps, stride=self.stride, padding=1, groups=x.shape[1]))
        bias = None if self.bias is None else self.bias.to(dtype)
        y = F.linear(as_rows(d), contiguous_as(self.pointwise, dtype), bias)
        y = y.view(d.shape[0], *d.shape[2:], -1).permute(0, 3, 1, 2)
        y = add_1x1(y, self.shortcut, self.skip, self.shortcut_weight)
        return epilogue(y, None, self.residual, self.activation, self.activate_residual, dtype)

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
        """`sepconv_heuristic` for the shape of the result."""
        found = sepconv_heuristic(gpu, self.x.shape[1], self.out_shape, self.x.element_size())
        if found.form != "march":
            return found
        # Each of these would spill two to four words in Triton 3.6 or 3.7.
        single = self.x.element_size() == 4
        if single and self.stride == 2 and gpu.arch == 80 and found.block_k >= 64:
            return replace(found, num_warps=4 if found.block_k == 128 else 8)
        if single and gpu.arch == 90 and found.block_k == 16 and found.block_n == 64:
            return replace(found, block_m=min(found.block_m, 32))
        if not single and gpu.arch >= 100 and found.block_k == 128 and self.shortcut is not None:
            return replace(found, num_warps=8)
        return found

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out = empty_nhwc(self.x, self.out_shape)
        return Plan(out, (self.launch(config, out),))

    def launch(self, config: Config, out: Tensor) -> Launch:
        """The launch of the call into `out`. ValueError for a form that cannot serve it.

        It fills `scratch_moments` (`ops/norm/channel_moments.py`) if the call returns channel statistics.
        """
        n, o, h, w = out.shape
        c, height, width = self.x.shape[1:]
        scale = 2 if self.upsample else 1
        depths = [0 if t is None else t.shape[1] for t in (self.shortcut, self.skip)]
        dtype = widest_dtype(self.x, self.pointwise, self.shortcut, self.skip)
        arguments: dict[str, Any] = {
            "x": nhwc(self.x),
            "depthwise": taps_last(self.depthwise),
            "pointwise": contiguous_as(self.pointwise, dtype),
            "bias": contiguous_as(self.bias),
            "residual": nhwc(self.residual),
            "shortcut": nhwc(self.shortcut),
            "skip": nhwc(self.skip),
            "shortcut_weight": contiguous_as(self.shortcut_weight, dtype),
            "out": out,
            "scratch_moments": None,
            "height": height * scale,
            "width": width * scale,
            "out_height": h,
            "out_width": w,
            "channels": c,
            "out_channels": o,
            "shortcut_c": depths[0],
            "skip_c": depths[1],
            "STRIDE": self.stride,
            "SCALE": scale,
            "ACTIVATION": self.activation,
            "ACTIVATE_RESIDUAL": self.activate_residual,
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_k,
            "BLOCK_N": config.block_n,
            # A GEMM in float32 runs without tensor cores, from registers.
            "SHORTCUT_BLOCK": next_power_of_2(max(depths), most=64 if dtype.itemsize == 2 else 16),
        }
        if config.form == "march":
            check(config.block_k >= c, f"march needs block_k of at least {c} channels, found {config.block_k}")
            programs = cdiv(h, config.rows) * cdiv(w, config.block_m)
            kernel, arguments["rows"] = kernels.march, config.rows
            # Narrow layers are those of large images: numbers of channels as constants make them 5 to 15 % faster, by
            # prediction. Wide ones gain 3 %, and networks have many widths of them to compile.
            narrow = config.block_k <= 64
            for name in ("channels", "out_channels", "shortcut_c", "skip_c"):
                arguments[name.upper()] = arguments[name] if narrow else None
        else:
            programs = cdiv(h * w, config.block_m)
            kernel, arguments["STAGES"] = kernels.tile, config.num_stages
        if isinstance(self, ChannelMoments):
            arguments["scratch_moments"] = scratch(out, programs)
        grid = (programs, cdiv(o, config.block_n), n)
        return Launch(kernel, grid, arguments, config.num_warps, config.num_stages)

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """`sepconv_space` for the shape of the result."""
        return sepconv_space(self.x.shape[1], self.out_shape)


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
        found = sepconv_heuristic(gpu, self.x.shape[1], (1, *self.out_shape[1:]), self.x.element_size(), True)
        if found.form == "march" and found.block_k == 64 and self.x.element_size() == 4 and gpu.arch == 80:
            # Eight warps of 64 registers would spill two words in Triton 3.6.
            return replace(found, num_warps=16, block_m=max(found.block_m // 2, 16))
        if found.form == "march" and found.num_warps == 4 and found.block_k <= 64:
            # With few output channels, 8 warps would spill a register on sm_80 in Triton 3.6.
            few = self.x.element_size() == 2 and found.block_k == 64 and found.block_n < 64
            if self.x.element_size() == 2 and found.block_k == 32 and gpu.arch != 100:
                # As many values per thread as with twice the pixels and warps, which would leave 8 warps of 150
                # registers on a multiprocessor instead of 16 of 116.
                return replace(found, block_m=max(found.block_m // 4, 16))
            # Half the pixels of 32 channels would spill 8 bytes on sm_100 in Triton 3.6.
            part = 4 if gpu.arch == 100 and found.block_k == 32 else 2
            return replace(found, num_warps=4 if few else 8, block_m=max(found.block_m // part, 16))
        if found.form == "march" and found.num_warps == 8 and found.block_k == 32 and found.block_n == 16:
            # Hopper: 108 registers for 4 programs per multiprocessor; twice the size would take 133, for one.
            return replace(found, num_warps=4, block_m=found.block_m // 2)
        if found.form == "march" and found.block_k == 128 and self.x.element_size() == 4:
            return replace(found, num_warps=16)
        ragged = self.shortcut is not None and self.x.shape[1] % 64 != 0
        if found.form == "march" and found.block_k == 128 and ragged and gpu.arch == 90:
            # The masks of the last channels would spill four words.
            return replace(found, num_warps=8, block_m=2 * found.block_m)
        return found
