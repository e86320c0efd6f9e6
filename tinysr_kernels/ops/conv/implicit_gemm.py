"""3x3 convolutions as implicit GEMMs: launch configurations, their choice, and the launches.

What `conv3x3` and `upsample_conv` share. The kernels are those of `kernels/conv3x3.py`, the library backend is cuDNN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Operator
from tinysr_kernels.ops.checks import check
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nhwc
from tinysr_kernels.ops.norm.channel_moments import scratch
from tinysr_kernels.ops.norm.kernels import norm_silu_prologue as prologue_kernel

SMEM_OPERANDS = (9, 10)
"""Major compute capabilities whose tensor cores read both operands from shared memory, not from registers."""

TILE_TIMES = {64: 1.0, 128: 1.33, 256: 2.2}
"""By block_m: predicted time of one program per multiprocessor on Hopper with a block_n of 128, relative to 64."""

MAX_CHANNELS = 10_000
"""Of the input: up to here 9 * channels^2, the error of `_reciprocal` times the reduction length, is below 2^30."""

MAX_SPLIT_K = 16
"""More partial sums than this cost more to add than they save."""


@dataclass(frozen=True)
class Config:
    """How a convolution runs. form: "tile" (implicit GEMM), "few" (`conv_few.py`) or "library", which ignores the rest.

    block_m: output pixels per program, tile_width of them per row of the tile ("few": its border included); block_n:
    output channels per program; block_k: reduction per step; split_k: the most programs that share one reduction.
    """

    form: str
    block_m: int
    tile_width: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


LIBRARY = Config("library", 1, 1, 1, 1, 1, 1, 1)


class Convolution(Operator):
    """A call that these kernels compute. Fields that an operator lacks have the values below.

    scale: 2 after a nearest x2 upsampling, whose four phases are computed at the low resolution, else 1.
    """

    __slots__ = ()
    config: ClassVar[type] = Config
    scale: ClassVar[int] = 1

    x: Tensor
    bias: Tensor | None
    activation: str
    residual: Tensor | None = None
    shortcut: Tensor | None = None
    skip: Tensor | None = None
    shortcut_weight: Tensor | None = None
    stride: int = 1
    activate_residual: bool = True
    norm_moments: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_groups: int = 1
    norm_eps: float = 0.0
    one_sided: bool = False

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N,O,H',W'] of the convolution's result."""
        raise NotImplementedError

    @property
    def norm_group_size(self) -> int:
        """Channels per group of the GroupNorm before the convolution; 1 without one."""
        return 1 if self.norm_weight is None else self.norm_weight.shape[0] // self.norm_groups

    def empty(self) -> Any:
        """[N,O,H',W'] in channels_last memory, of x's dtype."""
        return empty_nhwc(self.x, self.out_shape)

    def heuristic(self, gpu: Gpu) -> Any:
        """`implicit_gemm.heuristic`, independent of the batch size."""
        return heuristic(gpu, self)

    def space(self, gpu: Gpu) -> Iterator[Any]:
        """`implicit_gemm.space`."""
        return space(gpu, self)


class _Problem(NamedTuple):
    """The GEMM of one sample and phase: h x w output pixels, output channels, and input channels of each operand."""

    h: int
    w: int
    outputs: int
    inputs: tuple[int, ...]
    itemsize: int
    phases: int

    @classmethod
    def of(cls, call: Convolution) -> _Problem:
        _, o, h, w = call.out_shape
        inputs = tuple(t.shape[1] for t in (call.x, call.shortcut, call.skip) if t is not None)
        return cls(h // call.scale, w // call.scale, o, inputs, call.x.element_size(), call.scale**2)

    @property
    def depths(self) -> tuple[int, ...]:
        """Reduction length over each operand."""
        return self.inputs[0] * (9 if self.phases == 1 else 4), *self.inputs[1:]

    def tile_width(self, block_m: int) -> int:
        """Of a tile about as tall as wide, or narrower or flatter as the image is."""
        height = next_power_of_2(self.h, least=1, most=min(8, max(block_m // 8, 1)))
        return next_power_of_2(self.w, least=1, most=block_m // height)

    def programs(self, block_m: int, block_n: int) -> int:
        """Programs per sample without split-K."""
        width = self.tile_width(block_m)
        return cdiv(self.h, block_m // width) * cdiv(self.w, width) * cdiv(self.outputs, block_n) * self.phases


def heuristic(gpu: Gpu, call: Convolution) -> Config:
    """A tile whose accumulators fit the registers of its warps; smaller, or with split-K, for small images."""
    problem = _Problem.of(call)
    half = problem.itemsize == 2
    # Asynchronous copies of 16 bytes bypass the registers, narrower loads do not.
    wide = all(c * problem.itemsize % 16 == 0 for c in problem.inputs)
    block_n = next_power_of_2(problem.outputs, most=128 if half and wide else 64 if half else 32)
    # On other cards a block_k of 64 takes 160 to 184 registers, and 32 takes 128 to 152.
    deep = half and wide and gpu.capability[0] in SMEM_OPERANDS and block_n > 16
    block_k = next_power_of_2(problem.depths[0], most=64 if deep else 32 if half else 16)
    # Larger float32 tiles spill a register or two on some architecture in Triton 3.6 or 3.7, with 4 warps or 8.
    block_m = 128 if half else 32
    # For 128 input channels the largest tile would spill two words, in Triton 3.6 or in 3.7.
    if gpu.capability[0] == 9 and deep and block_n == 128 and problem.inputs[0] > 128:
        block_m = min(TILE_TIMES, key=lambda m: TILE_TIMES[m] * cdiv(problem.programs(m, block_n), gpu.multiprocessors))
        if block_m == 256:
            block_k = 32  # 64 would spill two words for 512 channels
    while block_m == 128 and problem.programs(block_m, block_n) < gpu.multiprocessors:
        block_m = 64
    steps = sum(cdiv(depth, block_k) for depth in problem.depths)

    def split(block_n: int) -> int:
        """The split_k that fills the GPU. Splits of fewer than 8 steps would mostly wait for memory."""
        programs = problem.programs(block_m, block_n)
        return max(min(gpu.multiprocessors // programs, steps // 8, MAX_SPLIT_K), 1)

    # A smaller block_n fills the GPU as well as more splits do, and leaves fewer partial sums to store and add. Each
    # block loads all pixels again: at 64 outputs as many bytes as the weights, at 32 twice as many.
    while block_n > 64 and split(block_n) > 1:
        block_n //= 2
    # Small tiles have too many addresses for 4 warps except on Hopper, whose wgmma takes 64 rows per warpgroup.
    small = half and wide and block_m * block_n <= 8192 and (block_m > 64 or gpu.capability[0] == 9)
    num_warps = 4 if small or not half else 8
    # One program of a small tile per multiprocessor waits for the L2, unless more steps are under way.
    num_stages = 3 if deep and block_m * block_n > 4096 else 4
    if not half and len(problem.inputs) > 1 and gpu.arch == 80:
        num_stages = 2  # three would spill two words in Triton 3.7, four in 3.6
    if block_n == 16 and half:
        num_stages = 1  # instead, many programs per multiprocessor
    width = problem.tile_width(block_m)
    return Config("tile", block_m, width, block_n, block_k, split(block_n), num_warps, num_stages)


def space(gpu: Gpu, call: Convolution) -> Iterator[Config]:
    """The library, and tiles whose accumulators leave free registers and whose buffers fit the shared memory."""
    yield LIBRARY
    usual, problem = heuristic(gpu, call), _Problem.of(call)
    half = problem.itemsize == 2
    most_accumulators = 4096 if gpu.capability[0] in SMEM_OPERANDS and half else 2048  # per warp
    steps = (32, 64, 128) if half else (16, 32)
    tiles = itertools.product((64, 128, 256), (32, 64, 128, 256), steps, (4, 8), (1, 2, 3, 4))
    for block_m, most_n, most_k, num_warps, num_stages in tiles:
        block_n = next_power_of_2(problem.outputs, most=most_n)
        block_k = next_power_of_2(problem.depths[0], most=most_k)
        buffers = (block_m + block_n) * block_k * problem.itemsize * num_stages
        if not 1024 * num_warps <= block_m * block_n <= most_accumulators * num_warps or buffers > gpu.shared_limit:
            continue
        width = problem.tile_width(block_m)
        for split_k in {1, usual.split_k, min(2 * usual.split_k, MAX_SPLIT_K)}:
            yield Config("tile", block_m, width, block_n, block_k, split_k, num_warps, num_stages)


def launches(
    config: Config, call: Convolution, weight: Tensor, out: Tensor, *, return_moments: bool = False
) -> tuple[Launch, ...]:
    """The implicit GEMM of a call into `out`; one launch more for each of a norm prologue and split-K.

    weight: [O,C,3,3] in channels_last memory, or phases [4,O,2,2,C]; the GEMM runs in its dtype. return_moments:
    whether the launch fills `scratch_moments` (`ops/norm/channel_moments.py`), which split-K does not.
    """
    n, o, h, w = out.shape
    c, height, width = call.x.shape[1:]
    shortcut_c, skip_c = (0 if t is None else t.shape[1] for t in (call.shortcut, call.skip))
    steps = sum(cdiv(depth, config.block_k) for depth in ((4 - call.scale) ** 2 * c, shortcut_c, skip_c))
    steps_per_split = cdiv(steps, min(config.split_k, steps))
    splits = cdiv(steps, steps_per_split)
    whole = splits == 1
    phases = call.scale**2
    tiles = cdiv(h // call.scale, config.block_m // config.tile_width) * cdiv(w // call.scale, config.tile_width)
    partials = None if whole else call.x.new_empty((splits, n, h, w, o), dtype=torch.float32)
    prologue = _prologue(call)
    arguments: dict[str, Any] = {
        "x": nhwc(call.x),
        "weight": weight,
        "shortcut": nhwc(call.shortcut),
        "skip": nhwc(call.skip),
        "shortcut_weight": contiguous_as(call.shortcut_weight, weight.dtype),
        "scratch_scale": prologue[0].arguments["scratch_scale"] if prologue else None,
        "norm_bias": contiguous_as(call.norm_bias),
        "FAST_TANH": call.x.element_size() == 2,
        "bias": contiguous_as(call.bias) if whole else None,
        "residual": nhwc(call.residual) if whole else None,
        "out": out if whole else None,
        "scratch_partials": partials,
        "scratch_moments": scratch(out, tiles * phases) if return_moments and whole else None,
        "height": height,
        "width": width,
        "out_height": h,
        "out_width": w,
        "k_per_split": steps_per_split * config.block_k,
        "channels": c,
        "reciprocal": _reciprocal(c),
        "ALIGNED": c % 16 == 0,
        # Tiles of 256 x 128 leave no registers for a stride.
        "OUT_CHANNELS": o if config.block_m * config.block_n > 16384 and call.residual is not None else 0,
        "out_channels": o,
        "shortcut_c": shortcut_c,
        "skip_c": skip_c,
        "STRIDE": call.stride,
        "PADDING": 0 if call.one_sided else 1,
        "SCALE": call.scale,
        "ACTIVATION": call.activation if whole else "none",
        "ACTIVATE_RESIDUAL": whole and call.activate_residual,
        "BLOCK_M": config.block_m,
        "TILE_WIDTH": config.tile_width,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_SIZE": 1,
    }
    grid = (tiles * cdiv(o, config.block_n) * phases, splits, n)
    gemm = Launch(conv3x3_kernel.conv, grid, arguments, config.num_warps, config.num_stages)
    return (*prologue, gemm, *(() if partials is None else epilogue(partials, call, out)))


def _reciprocal(channels: int) -> int:
    """2^30 / channels, rounded up: k * reciprocal >> 30 is k // channels for every k of a reduction over nine taps."""
    check(channels <= MAX_CHANNELS, f"x must have at most {MAX_CHANNELS} channels, found {channels}")
    return cdiv(1 << 30, channels)


def _prologue(call: Convolution) -> tuple[Launch, ...]:
    """Mean and gain per channel of the GroupNorm before a convolution: one launch, so that its programs need not."""
    if call.norm_moments is None or call.norm_weight is None:
        return ()
    n, _, channels = call.norm_moments.shape
    group_block = next_power_of_2(call.norm_group_size, least=1)
    block_n = next_power_of_2(channels, most=max(1024 // group_block, 16))
    arguments = {
        "moments": contiguous_as(call.norm_moments),
        "weight": contiguous_as(call.norm_weight),
        "scratch_scale": call.norm_moments.new_empty((n, 2, channels), dtype=torch.float32),
        "eps": call.norm_eps,
        "channels": channels,
        "GROUP_SIZE": call.norm_group_size,
        "GROUP_BLOCK": group_block,
        "BLOCK_N": block_n,
    }
    return (Launch(prologue_kernel.store_mean_and_gain, (cdiv(channels, block_n), n), arguments, 4, 1),)


def epilogue(partials: Tensor, call: Convolution, out: Tensor) -> tuple[Launch, ...]:
    """The sum of split-K's partials [splits,N,H,W,O] with the call's epilogue; in place if `partials` is `out`."""
    n, o, h, w = out.shape
    in_place = partials is out
    if in_place and call.bias is None and call.residual is None and call.activation == "none":
        return ()
    block_n = next_power_of_2(o, most=64)
    block_m = 1024 // block_n
    arguments = {
        "scratch_partials": partials,
        "bias": contiguous_as(call.bias),
        "residual": nhwc(call.residual),
        "out": out,
        "pixels": h * w,
        "OUT_CHANNELS": o,
        "ACTIVATION": call.activation,
        "ACTIVATE_RESIDUAL": call.activate_residual,
        "SPLIT_K": 1 if in_place else partials.shape[0],
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return (Launch(conv3x3_kernel.merge_splits, (cdiv(h * w, block_m) * cdiv(o, block_n), n), arguments, 4, 1),)


def convolve(x: Tensor, weight: Tensor, stride: int, padding: int, out: Tensor) -> None:
    """The library's convolution into `out`, in float32 where x is, always by the same algorithm."""
    if x.is_cuda:
        # torch.conv2d would allocate its result, and round float32 to tf32 unless disabled for the whole process.
        torch.ops.aten.cudnn_convolution.out(
            x, weight, [padding] * 2, [stride] * 2, [1, 1], 1, False, True, False, out=out
        )
    else:
        out.copy_(F.conv2d(x, weight, stride=stride, padding=padding))
