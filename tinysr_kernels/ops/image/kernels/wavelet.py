"""The kernel of wavelet_fix: one level of the blur chain, both axes at once; the last level finishes the image.

The band to blur comes from the kernel of resize_bicubic (kernels/resize.py).
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, image_value, unit_range
from tinysr_kernels.ops.image.kernels.clamp_image import row_offsets


@jit
def blur(  # type: ignore[no-untyped-def]
    low,  # [N,height,width*channels] float32, the band to blur
    x,  # [N,channels,height,width], with the strides below, on the last level; else None
    out,  # like low; on the last level the result, in its dtype
    finite,  # [N,height] bool on the last level, else None
    height,
    width,
    channels,
    sample_stride,
    channel_stride,
    row_stride,
    column_stride,
    DILATION: tl.constexpr,
    DENSE: tl.constexpr,  # whether rows of x are dense, with channels innermost
    BLOCK_SIZE: tl.constexpr,
):
    """One level of the chain, with replicate padding; the last level also writes out = clamp(clamp(x) + blurred).

    Grid: rows x blocks of BLOCK_SIZE elements of a row (on the last level one program per row), samples.
    """
    await_inputs()
    length = width * channels
    # Both on one axis: the others end at 65535.
    blocks = tl.num_programs(0) // height
    y = tl.program_id(0) // blocks
    sample = tl.program_id(1).to(tl.int64)
    bad = tl.full((BLOCK_SIZE,), 0, tl.int32)
    for start in range(tl.program_id(0) % blocks * BLOCK_SIZE, length, blocks * BLOCK_SIZE):
        offs = start + tl.arange(0, BLOCK_SIZE)
        # Offsets past the end of the row read its last element and store nothing.
        column = tl.minimum(offs, length - 1)
        chan = column % channels
        left = tl.maximum(column - DILATION * channels, chan)
        right = tl.minimum(column + DILATION * channels, length - channels + chan)
        total = tl.full((BLOCK_SIZE,), 0.0, tl.float32)
        for step in tl.static_range(-1, 2):
            row = tl.minimum(tl.maximum(y + step * DILATION, 0), height - 1)
            band = low + (sample * height + row) * length
            sides = tl.load(band + left) + tl.load(band + right)
            total += (0.5 * tl.load(band + column) + 0.25 * sides) * (0.5 - 0.25 * step * step)
        mask = offs < length
        if x is not None:
            at = row_offsets(offs, channels, channel_stride, column_stride, DENSE)
            image = x + sample * sample_stride + y.to(tl.int64) * row_stride
            v = tl.load(image + at, mask=mask, other=0.0).to(tl.float32)
            bad += tl.where(tl.abs(v) < float("inf"), 0, 1)
            total = unit_range(unit_range(v) + total)
        tl.store(out + (sample * height + y) * length + offs, image_value(total, out.dtype.element_ty), mask=mask)
    if x is not None:
        tl.store(finite + sample * height + y, tl.sum(bad, 0) == 0)
