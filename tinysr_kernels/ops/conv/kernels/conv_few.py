"""conv3x3 with few output channels: one GEMM of each pixel with all nine taps, then nine shifted sums (kn2row).

A tile is read with a border of one pixel. Its GEMM with a matrix of 9 * OUT_CHANNELS columns holds what every pixel
contributes to each of its neighbors; a gather along the pixels moves each contribution to where it is added. So each
pixel is loaded, and goes through a GroupNorm prologue, once per tile; an implicit GEMM does both nine times.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, bias_row, epilogue, round_to, tile_dot
from tinysr_kernels.ops.norm.kernels.norm_silu_prologue import mean_and_gain, norm_silu


@jit
def conv_few(  # type: ignore[no-untyped-def]
    x,  # [N,height,width,CHANNELS]
    weight,  # [OUT_CHANNELS,3,3,CHANNELS]
    bias,  # [OUT_CHANNELS] or None
    residual,  # like out, or None
    norm_moments,  # [N,2,CHANNELS], statistics of x for a GroupNorm and SiLU prologue, or None
    norm_weight,  # [CHANNELS] or None
    norm_bias,  # [CHANNELS] or None
    out,  # [N,height,width,OUT_CHANNELS]
    norm_eps,
    height: extent,
    width: extent,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # channels per group
    GROUP_BLOCK: tl.constexpr,  # at least GROUP_SIZE
    FAST_TANH: tl.constexpr,  # whether SiLU may be as inexact as half precision
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,  # pixels per tile, border included
    TILE_WIDTH: tl.constexpr,  # columns per tile, border included
    BLOCK_K: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,  # at least 9 * OUT_CHANNELS
    BLOCK_N: tl.constexpr,  # at least OUT_CHANNELS
):
    """Grid: tiles in reading order, samples."""
    await_inputs()
    TILE_HEIGHT: tl.constexpr = BLOCK_M // TILE_WIDTH
    across = tl.cdiv(width, TILE_WIDTH - 2)
    top = tl.program_id(0) // across * (TILE_HEIGHT - 2) - 1
    left = tl.program_id(0) % across * (TILE_WIDTH - 2) - 1
    sample = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    row = top + lane // TILE_WIDTH
    column = left + lane % TILE_WIDTH
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    base = (sample * height + top) * width + left
    pixel = lane // TILE_WIDTH * width + lane % TILE_WIDTH
    gemm_column = tl.arange(0, BLOCK_TAPS)
    tap = gemm_column // OUT_CHANNELS
    products = tl.full((BLOCK_M, BLOCK_TAPS), 0.0, tl.float32)
    for start in range(0, CHANNELS, BLOCK_K):
        chan = start + tl.arange(0, BLOCK_K)
        k_mask = chan < CHANNELS
        known = inside[:, None] & k_mask[None, :]
        at = base * CHANNELS + (pixel[:, None] * CHANNELS + chan[None, :])
        a = tl.load(x + at, mask=known, other=0.0)
        b = tl.load(
            weight + ((gemm_column % OUT_CHANNELS * 9 + tap)[None, :] * CHANNELS + chan[:, None]),
            mask=(tap < 9)[None, :] & k_mask[:, None],
            other=0.0,
        )
        if norm_moments is not None:
            mean, gain = mean_and_gain(
                norm_moments, norm_weight, norm_eps, sample, chan, CHANNELS, GROUP_SIZE, GROUP_BLOCK
            )
            shift = tl.load(norm_bias + chan, mask=k_mask, other=0.0).to(tl.float32)
            y = norm_silu(a, mean[None, :], gain[None, :], shift[None, :], FAST_TANH)
            # The zero padding follows the norm.
            a = round_to(tl.where(known, y, 0.0), b.dtype)
        products = tile_dot(a.to(b.dtype), b, products)
    # A pixel's contribution is at its neighbor in the tap's direction; pixels on the border of the tile store nothing.
    source = lane[:, None] + ((tap // 3 - 1) * TILE_WIDTH + tap % 3 - 1)[None, :]
    shifted = tl.gather(products, tl.minimum(tl.maximum(source, 0), BLOCK_M - 1), 0)
    outs = tl.arange(0, BLOCK_N)
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for output in tl.static_range(OUT_CHANNELS):
        own = (gemm_column % OUT_CHANNELS == output) & (tap < 9)
        total = tl.sum(tl.where(own[None, :], shifted, 0.0), 1)
        acc += tl.where(outs[None, :] == output, total[:, None], 0.0)
    inner = (lane >= TILE_WIDTH) & (lane < BLOCK_M - TILE_WIDTH)
    inner &= (lane % TILE_WIDTH > 0) & (lane % TILE_WIDTH < TILE_WIDTH - 1)
    known = (inner & inside)[:, None] & (outs[None, :] < OUT_CHANNELS)
    beta = bias_row(bias, outs, OUT_CHANNELS, BLOCK_N)
    at = pixel[:, None] * OUT_CHANNELS + outs[None, :]
    epilogue(acc, beta, residual, out, base * OUT_CHANNELS, at, known, ACTIVATION, ACTIVATE_RESIDUAL)
