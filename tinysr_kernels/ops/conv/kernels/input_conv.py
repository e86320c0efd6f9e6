"""The kernel of input_conv: an implicit GEMM whose rows are the patches of the image, constant border included.

uint8 values enter the GEMM unscaled, since every dtype holds them exactly; its accumulators are divided by 255.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, extent_or_1, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, bias_row, round_to, tile_dot


@jit
def convolve(  # type: ignore[no-untyped-def]
    x,  # [N,CHANNELS,height,width] with the strides below; uint8 holds 255 times the image
    weight,  # [out_channels,KERNEL_SIZE,KERNEL_SIZE,CHANNELS]
    bias,  # [out_channels] or None
    out,  # [N,out_height,out_width,out_channels]
    border,  # the value around the image
    height: extent,
    width: extent,
    out_height: extent,
    out_width,
    out_channels,
    sample_stride: extent,
    channel_stride: extent_or_1,
    row_stride: extent,
    column_stride: extent_or_1,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr,  # rows and columns of the weight
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: BLOCK_M output pixels in reading order, blocks of output channels, samples."""
    await_inputs()
    DEPTH: tl.constexpr = KERNEL_SIZE * KERNEL_SIZE * CHANNELS
    UNIT: tl.constexpr = 255.0 if x.dtype.element_ty == tl.uint8 else 1.0
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    pixel = (first + lane).to(tl.int32)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(2).to(tl.int64)
    m_mask = first + lane < out_height * out_width
    top = pixel // out_width * STRIDE - PADDING
    left = pixel % out_width * STRIDE - PADDING
    x += sample * sample_stride
    acc = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for start in tl.static_range(0, DEPTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        tap = k // CHANNELS
        row = top[:, None] + (tap // KERNEL_SIZE)[None, :]
        column = left[:, None] + (tap % KERNEL_SIZE)[None, :]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        at += (k % CHANNELS).to(tl.int64)[None, :] * channel_stride
        seen = inside & m_mask[:, None] & (k < DEPTH)[None, :]
        a = tl.where(inside, tl.load(x + at, mask=seen, other=0).to(tl.float32), border * UNIT)
        at = weight + outs[None, :] * DEPTH + k[:, None]
        b = tl.load(at, mask=(outs < out_channels)[None, :] & (k < DEPTH)[:, None], other=0.0)
        acc = tile_dot(round_to(a, b.dtype), b, acc)
    v = acc * (1.0 / UNIT) + bias_row(bias, outs, out_channels, BLOCK_N)
    at = (sample * out_height * out_width + first) * out_channels + (lane[:, None] * out_channels + outs[None, :])
    tl.store(out + at, round_to(v, out.dtype.element_ty), mask=m_mask[:, None] & (outs < out_channels)[None, :])
