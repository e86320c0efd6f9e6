"""The kernel of clamp_image, and the addressing of image rows that it shares with wavelet_fix."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, image_value, unit_range


@jit
def row_offsets(offs, channels, channel_stride, column_stride, DENSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Memory offsets of elements `offs` of an image row; DENSE: the row is dense, with channels innermost."""
    if DENSE:
        at = offs
    else:
        at = (offs // channels).to(tl.int64) * column_stride + (offs % channels).to(tl.int64) * channel_stride
    return at


@jit
def clamp(  # type: ignore[no-untyped-def]
    x,  # [N,channels,height,width], with the strides below
    out,  # [N,height,width*channels]
    finite,  # [N,height] bool
    height: extent,
    width,
    channels,
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    DENSE: tl.constexpr,  # whether rows of x are dense, with channels innermost
    BLOCK_SIZE: tl.constexpr,
):
    """out = clamp(x, 0, 1). Grid: rows, samples."""
    await_inputs()
    y = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    length = width * channels
    x += sample * sample_stride + y.to(tl.int64) * row_stride
    out += (sample * height + y) * length
    bad = tl.full((BLOCK_SIZE,), 0, tl.int32)
    for start in range(0, length, BLOCK_SIZE):
        offs = start + tl.arange(0, BLOCK_SIZE)
        mask = offs < length
        at = row_offsets(offs, channels, channel_stride, column_stride, DENSE)
        v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        bad += tl.where(tl.abs(v) < float("inf"), 0, 1)
        tl.store(out + offs, image_value(unit_range(v), out.dtype.element_ty), mask=mask)
    tl.store(finite + sample * height + y, tl.sum(bad, 0) == 0)
