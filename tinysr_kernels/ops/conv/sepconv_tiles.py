"""Launch configurations of the separable convolutions, and their launches; shared by `sepconv` and `sepconv_block`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, cdiv, next_power_of_2
from tinysr_kernels.ops.checks import check
from tinysr_kernels.ops.conv.kernels import sepconv as kernels
from tinysr_kernels.ops.layout import contiguous_as, nhwc, widest_dtype
from tinysr_kernels.ops.norm.channel_moments import scratch

if TYPE_CHECKING:
    from tinysr_kernels.ops.conv.sepconv import SepConv

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


def heuristic(gpu: Gpu, channels: int, out_shape: tuple[int, int, int, int], itemsize: int) -> Config:
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
        # Steps of 32 channels would spill a few words at 64 and 80 registers.
        return Config("tile", 1, 32, min(block_k, 16), block_n, 8, 1)
    tile, num_warps, resident = 2048, 4, 3
    if channels % 8 or itemsize > 2:
        # Narrower vectors have more addresses, and a GEMM in float32 holds its operands in registers.
        tile, num_warps = 1024, 8 if block_k > 64 else 4
    elif gpu.capability[0] == 9 and block_k <= 64 <= w:
        tile, num_warps, resident = 4096, 8, 2
    block_m = next_power_of_2(min(tile // block_k, w), most=64)
    # One wave of programs, of few rows where the image is too small to fill it.
    across = n * cdiv(w, block_m) * cdiv(o, block_n)
    strips = max(resident * gpu.multiprocessors // across, 1)
    return Config("march", min(cdiv(h, strips), MAX_ROWS), block_m, block_k, block_n, num_warps, 1)


def space(channels: int, out_shape: tuple[int, int, int, int]) -> Iterator[Config]:
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


def launch(config: Config, call: SepConv, out: Tensor, *, return_moments: bool = False) -> Launch:
    """The launch of a call into `out`. ValueError for a form that cannot serve it.

    return_moments: whether it fills `scratch_moments` (`ops/norm/channel_moments.py`).
    """
    n, o, h, w = out.shape
    c, height, width = call.x.shape[1:]
    scale = 2 if call.upsample else 1
    depths = [0 if t is None else t.shape[1] for t in (call.shortcut, call.skip)]
    dtype = widest_dtype(call.x, call.pointwise, call.shortcut, call.skip)
    arguments: dict[str, Any] = {
        "x": nhwc(call.x),
        "depthwise": taps_last(call.depthwise),
        "pointwise": contiguous_as(call.pointwise, dtype),
        "bias": contiguous_as(call.bias),
        "residual": nhwc(call.residual),
        "shortcut": nhwc(call.shortcut),
        "skip": nhwc(call.skip),
        "shortcut_weight": contiguous_as(call.shortcut_weight, dtype),
        "out": out,
        "scratch_moments": None,
        "height": height * scale,
        "width": width * scale,
        "out_height": h,
        "out_width": w,
        "CHANNELS": c,
        "OUT_CHANNELS": o,
        "SHORTCUT_C": depths[0],
        "SKIP_C": depths[1],
        "STRIDE": call.stride,
        "SCALE": scale,
        "ACTIVATION": call.activation,
        "ACTIVATE_RESIDUAL": call.activate_residual,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BLOCK_N": config.block_n,
        # A GEMM in float32 runs without tensor cores, from registers.
        "SHORTCUT_BLOCK": next_power_of_2(max(depths), most=64 if dtype.itemsize == 2 else 16),
    }
    if config.form == "march":
        check(config.block_k >= c, f"march needs block_k of at least {c} channels, found {config.block_k}")
        programs = cdiv(h, config.rows) * cdiv(w, config.block_m)
        kernel, arguments["ROWS"] = kernels.march, config.rows
    else:
        programs = cdiv(h * w, config.block_m)
        kernel, arguments["STAGES"] = kernels.tile, config.num_stages
    if return_moments:
        arguments["scratch_moments"] = scratch(out, programs)
    grid = (programs, cdiv(o, config.block_n), n)
    return Launch(kernel, grid, arguments, config.num_warps, config.num_stages)
