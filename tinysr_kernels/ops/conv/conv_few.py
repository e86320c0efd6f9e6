"""conv3x3 with few output channels, as one GEMM and nine shifted sums (`kernels/conv_few.py`): configurations, launch.

An implicit GEMM with 3 outputs leaves most of its narrowest tile empty. Here the nine taps share one tile, but its
gather and sums conflict in the banks of shared memory. With 16-byte loads an implicit GEMM is predicted to be faster,
so this form is chosen only for float32 and for channels that are no multiple of 8.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from tinysr_kernels.launch.plan import Launch, cdiv, next_power_of_2
from tinysr_kernels.ops.conv.implicit_gemm import Config, Convolution
from tinysr_kernels.ops.conv.kernels import conv_few as conv_few_kernel
from tinysr_kernels.ops.layout import contiguous_as, nhwc

MAX_OUTPUTS = 7
"""Output channels whose nine taps fill at most two of the GEMM's narrowest efficient tiles, of 32 columns."""


def applies(call: Convolution) -> bool:
    """Whether a convolution has the form: few outputs, stride 1, no shortcut."""
    return call.out_shape[1] <= MAX_OUTPUTS and call.stride == 1 and call.shortcut is None


def heuristic(call: Convolution) -> Config:
    """A tile size that the static checks have shown to spill no registers."""
    _, o, _, w = call.out_shape
    tile_width = next_power_of_2(w + 2, least=4, most=32)
    block_n = next_power_of_2(9 * o)
    wide = call.x.element_size() > 2 and call.x.shape[1] % 8 == 0 and block_n <= 32
    return Config("few", 512 if wide else 256, tile_width, block_n, 32, 1, 8, 1)


def space(call: Convolution) -> Iterator[Config]:
    """Larger and smaller tiles."""
    for block_m, num_warps in itertools.product((256, 512), (4, 8)):
        yield dataclasses.replace(heuristic(call), block_m=block_m, num_warps=num_warps)


def launch(config: Config, call: Convolution, weight: Tensor, out: Tensor) -> Launch:
    """The launch of a call into `out`. weight: [O,C,3,3] in channels_last memory; the GEMM runs in its dtype."""
    n, o, h, w = out.shape
    arguments: dict[str, Any] = {
        "x": nhwc(call.x),
        "weight": weight,
        "bias": contiguous_as(call.bias),
        "residual": nhwc(call.residual),
        "norm_moments": contiguous_as(call.norm_moments),
        "norm_weight": contiguous_as(call.norm_weight),
        "norm_bias": contiguous_as(call.norm_bias),
        "out": out,
        "norm_eps": 0.0 if call.norm_moments is None else call.norm_eps,
        "height": h,
        "width": w,
        "CHANNELS": call.x.shape[1],
        "OUT_CHANNELS": o,
        "GROUP_SIZE": call.norm_group_size,
        "GROUP_BLOCK": next_power_of_2(call.norm_group_size, least=1),
        "FAST_TANH": call.x.element_size() == 2,
        "ACTIVATION": call.activation,
        "ACTIVATE_RESIDUAL": call.activate_residual,
        "BLOCK_M": config.block_m,
        "TILE_WIDTH": config.tile_width,
        "BLOCK_K": config.block_k,
        "BLOCK_TAPS": max(config.block_n, next_power_of_2(9 * o)),
        "BLOCK_N": next_power_of_2(o, least=1),
    }
    grid = (cdiv(h, config.block_m // config.tile_width - 2) * cdiv(w, config.tile_width - 2), n)
    return Launch(conv_few_kernel.conv_few, grid, arguments, config.num_warps, config.num_stages)
