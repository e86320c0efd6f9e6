"""Moments of the rows of a product: left by the tile that makes them, put together by the tile that needs them.

A tile leaves two numbers for each row and PART features: their mean and the sum of their squared deviations. `merged`
puts those of a whole row together by Chan's rule, in a fixed order and without atomics.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs


@jit
def store_row_moments(v, out_moments, first_row, row, begin, rows, features, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the moments of a tile v [ROWS,COLUMNS], as it is stored itself, in out_moments [rows,2,parts] float32.

    first_row: int64; row [ROWS] counted from there; begin: the tile's first feature, a multiple of PART.
    """
    ROWS: tl.constexpr = v.shape[0]
    PARTS: tl.constexpr = v.shape[1] // PART
    parts = tl.cdiv(features, PART)
    number = begin // PART + tl.arange(0, PARTS)
    column = (number * PART)[None, :, None] + tl.arange(0, PART)[None, None, :]
    known = column < features
    values = tl.where(known, tl.reshape(v.to(tl.float32), (ROWS, PARTS, PART)), 0.0)
    count = tl.maximum(tl.minimum(features - number * PART, PART), 1).to(tl.float32)[None, :]
    mean = tl.sum(values, 2) / count
    deviation = tl.where(known, values - mean[:, :, None], 0.0)
    at = out_moments + first_row * (2 * parts) + (row[:, None] * (2 * parts) + number[None, :])
    there = (row < rows - first_row)[:, None] & (number < parts)[None, :]
    tl.store(at, mean, mask=there)
    tl.store(at + parts, tl.sum(deviation * deviation, 2), mask=there)


@jit
def merge_row_moments(row_moments, first_row, row, depth, eps, PART: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and 1 / sqrt(variance + eps), both [ROWS] float32, of rows `first_row + row` of `depth` features.

    row_moments [rows,2,parts]; PARTS: at least parts.
    """
    parts = tl.cdiv(depth, PART)
    number = tl.arange(0, PARTS)
    known = (number < parts)[None, :]
    count = tl.minimum(depth - number * PART, PART).to(tl.float32)[None, :]
    at = row_moments + first_row * (2 * parts) + (row[:, None] * (2 * parts) + number[None, :])
    means = tl.load(at, mask=known, other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(known, means * count, 0.0), 1) / depth
    deviation = means - mean[:, None]
    squares = tl.load(at + parts, mask=known, other=0.0).to(tl.float32)
    variance = tl.sum(tl.where(known, squares + count * deviation * deviation, 0.0), 1) / depth
    # Correctly rounded: it multiplies every element.
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@jit
def take(  # type: ignore[no-untyped-def]
    out,  # [rows,features]
    out_moments,  # [rows,2,parts] float32
    rows,
    features,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Of a result in memory. Grid: blocks of rows, blocks of features."""
    await_inputs()
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    begin = tl.program_id(1) * COLUMNS
    column = begin + tl.arange(0, COLUMNS)
    known = (row < rows - first_row)[:, None] & (column < features)[None, :]
    at = out + first_row * features + (row[:, None] * features + column[None, :])
    store_row_moments(tl.load(at, mask=known, other=0.0), out_moments, first_row, row, begin, rows, features, PART)
