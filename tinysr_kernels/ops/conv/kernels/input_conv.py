"""The kernel of input_conv: the patch of each pixel is gathered as a row of a product, the constant border with it.

Bytes go into the product as they are, which every dtype holds exactly, and its sums are divided by 255.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, bias_row, round_to, tile_dot


@jit
def convolve(  # type: ignore[no-untyped-def]
    x,  # [N,CHANNELS,height,width] of the strides below; bytes hold 255 times the image
    weight,  # [outputs,SIDE,SIDE,CHANNELS]
    bias,  # [outputs] or None
    out,  # [N,out_height,out_width,outputs]
    border,
    height,
    width,
    out_height,
    out_width,
    outputs,
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    CHANNELS: tl.constexpr,
    SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    SLICE: tl.constexpr,
):
    """Grid: PIXELS output pixels in reading order, blocks of outputs, samples."""
    await_inputs()
    DEPTH: tl.constexpr = SIDE * SIDE * CHANNELS
    UNIT: tl.constexpr = 255.0 if x.dtype.element_ty == tl.uint8 else 1.0
    first = tl.program_id(0).to(tl.int64) * PIXELS
    lane = tl.arange(0, PIXELS)
    pixel = (first + lane).to(tl.int32)
    outs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sample = tl.program_id(2).to(tl.int64)
    there = first + lane < out_height * out_width
    top = pixel // out_width * STRIDE - PADDING
    left = pixel % out_width * STRIDE - PADDING
    x += sample * sample_stride
    acc = tl.full((PIXELS, OUTPUTS), 0.0, tl.float32)
    for start in tl.static_range(0, DEPTH, SLICE):
        k = start + tl.arange(0, SLICE)
        tap = k // CHANNELS
        row = top[:, None] + (tap // SIDE)[None, :]
        column = left[:, None] + (tap % SIDE)[None, :]
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        at = row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
        at += (k % CHANNELS).to(tl.int64)[None, :] * channel_stride
        seen = inside & there[:, None] & (k < DEPTH)[None, :]
        rows = tl.where(inside, tl.load(x + at, mask=seen, other=0).to(tl.float32), border * UNIT)
        at = weight + outs[None, :] * DEPTH + k[:, None]
        columns = tl.load(at, mask=(outs < outputs)[None, :] & (k < DEPTH)[:, None], other=0.0)
        acc = tile_dot(round_to(rows, columns.dtype), columns, acc)
    v = acc * (1.0 / UNIT) + bias_row(bias, outs, outputs, OUTPUTS)
    at = (sample * out_height * out_width + first) * outputs + (lane[:, None] * outputs + outs[None, :])
    tl.store(out + at, round_to(v, out.dtype.element_ty), mask=there[:, None] & (outs < outputs)[None, :])
