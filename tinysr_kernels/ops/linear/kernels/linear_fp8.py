"""The kernel of linear_fp8 and linear_fp8_quantized: products of a tile of rows with a block of features, in e4m3.

Each slice of the reduction is a product of its own, whose sums are scaled by the rows' scales and added to those of
the slices before it in float32. Because of the scale between them the compiler cannot let the tensor cores go on adding
to sums that they hold in fewer digits. Programs run in bands of rows, as linear's do.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, gelu_tanh, round_to, tile_dot
from tinysr_kernels.ops.linear.kernels.quantize import scaled


@jit
def linear(  # type: ignore[no-untyped-def]
    x,  # [rows,depth] e4m3
    x_scale,  # [rows,groups]
    weight,  # [features,depth] e4m3
    weight_scale,  # [features]
    bias,  # [features] or None
    residual,  # [rows,features] or None
    out,  # [rows,features], e4m3 where there is out_scale
    out_scale,  # [rows,features / COLUMNS] or None
    smallest,  # what the largest magnitude of a row of zeros is taken for
    rows,
    features,
    depth,
    groups,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,  # with out_scale, those that share a scale; it divides features
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,  # elements of a row that share a scale, a multiple of SLICE; 0 where all do
    WHOLE: tl.constexpr,  # whether SLICE divides depth
    BAND: tl.constexpr,  # blocks of rows that run together
):
    """Grid: all tiles of the result, in bands of BAND blocks of rows."""
    await_inputs()
    down = tl.cdiv(rows, ROWS)
    across = tl.cdiv(features, COLUMNS)
    first = tl.program_id(0) // (BAND * across) * BAND
    height = tl.minimum(down - first, BAND)
    inside = tl.program_id(0) % (BAND * across)
    first_row = (first + inside % height).to(tl.int64) * ROWS
    block = inside // height
    row = tl.arange(0, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)

    # Rows and features that are not there read the last one, which needs no mask; nothing of it is stored.
    last = tl.minimum(row, (rows - 1 - first_row).to(tl.int32))
    taken = tl.minimum(column, features - 1)
    k = tl.arange(0, SLICE)
    at_x = x + first_row * depth + last[:, None] * depth + k[None, :]
    at_weight = weight + taken[None, :] * depth + k[:, None]
    at_scale = x_scale + first_row * groups + last * groups
    acc = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    if GROUP == 0:
        scale = tl.load(at_scale).to(tl.float32)[:, None]
    for start in range(0, depth, SLICE):
        if WHOLE:
            a = tl.load(at_x + start)
            b = tl.load(at_weight + start)
        else:
            known = k < depth - start
            a = tl.load(at_x + start, mask=known[None, :], other=0.0)
            b = tl.load(at_weight + start, mask=known[:, None], other=0.0)
        sums = tile_dot(a, b, tl.full((ROWS, COLUMNS), 0.0, tl.float32))
        if GROUP > 0:
            acc += sums * tl.load(at_scale + start // GROUP).to(tl.float32)[:, None]
        else:
            acc += sums * scale

    there = row < rows - first_row
    inner = column < features
    v = acc * tl.load(weight_scale + column, mask=inner, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        v += tl.load(bias + column, mask=inner, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu_tanh":
        v = gelu_tanh(v)
    # Only the way to the first row may need 64 bits; from there on offsets of 32 take half the registers.
    at = row[:, None] * features + column[None, :]
    mask = there[:, None] & inner[None, :]
    if residual is not None:
        v += tl.load(residual + first_row * features + at, mask=mask, other=0.0).to(tl.float32)
    if out_scale is not None:
        top = tl.maximum(tl.max(tl.abs(v), 1), smallest)
        tl.store(out + first_row * features + at, scaled(v, top), mask=mask)
        tl.store(out_scale + (first_row + row) * across + block, tl.div_rn(top, 448.0), mask=there)
    else:
        tl.store(out + first_row * features + at, round_to(v, out.dtype.element_ty), mask=mask)
