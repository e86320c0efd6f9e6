"""Row statistics of a matmul's result: stored by the program that computes a tile, merged by the one that consumes it.

A tile stores two numbers per row and PART features: their mean and their sum of squared deviations. Those of a whole
row are merged by Chan's rule, in a fixed order and without atomics.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs


@jit
def store_row_moments(v, out_moments, first_row, rows, first_col, M, N, PART: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store the statistics of a tile v [BLOCK_M,BLOCK_N], rounded as in `out`, in out_moments [M,2,parts] float32.

    first_row: int64; rows: [BLOCK_M] counted from there; first_col: the tile's first feature, a multiple of PART.
    """
    BLOCK_M: tl.constexpr = v.shape[0]
    PARTS: tl.constexpr = v.shape[1] // PART
    parts = tl.cdiv(N, PART)
    part = first_col // PART + tl.arange(0, PARTS)
    cols = (part * PART)[None, :, None] + tl.arange(0, PART)[None, None, :]
    mask = cols < N
    values = tl.where(mask, tl.reshape(v.to(tl.float32), (BLOCK_M, PARTS, PART)), 0.0)
    count = tl.maximum(tl.minimum(N - part * PART, PART), 1).to(tl.float32)[None, :]
    mean = tl.sum(values, 2) / count
    deviation = tl.where(mask, values - mean[:, :, None], 0.0)
    at = out_moments + first_row * (2 * parts) + (rows[:, None] * (2 * parts) + part[None, :])
    stored = (rows < M - first_row)[:, None] & (part < parts)[None, :]
    tl.store(at, mean, mask=stored)
    tl.store(at + parts, tl.sum(deviation * deviation, 2), mask=stored)


@jit
def _means(at, start, K, PART: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Means, features and mask of parts `start` to `start + BLOCK` of rows that begin at `at` [BLOCK_M,BLOCK]."""
    part = start + tl.arange(0, BLOCK)
    mask = (part < PARTS)[None, :]
    count = tl.minimum(K - part * PART, PART).to(tl.float32)[None, :]
    return tl.load(at + start, mask=mask, other=0.0).to(tl.float32), count, mask


@jit
def merge_row_moments(row_moments, first_row, rows, K, eps, PART: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and 1 / sqrt(variance + eps), both [BLOCK_M] float32, of rows `first_row + rows` of K features.

    row_moments: [M,2,PARTS]. PARTS is a constant, which makes loads of 16 bytes of it, and loaded in blocks, twice,
    which takes few registers: every program of a matmul does this before its first load.
    """
    BLOCK: tl.constexpr = 16 if PARTS > 8 else 8
    at = row_moments + first_row * (2 * PARTS) + (rows[:, None] * (2 * PARTS) + tl.arange(0, BLOCK)[None, :])
    total = tl.full((rows.shape[0], BLOCK), 0.0, tl.float32)
    for start in tl.static_range(0, PARTS, BLOCK):
        means, count, mask = _means(at, start, K, PART, PARTS, BLOCK)
        total += tl.where(mask, means * count, 0.0)
    mean = tl.sum(total, 1) / K
    total = tl.full((rows.shape[0], BLOCK), 0.0, tl.float32)
    for start in tl.static_range(0, PARTS, BLOCK):
        means, count, mask = _means(at, start, K, PART, PARTS, BLOCK)
        deviation = means - mean[:, None]
        squares = tl.load(at + (PARTS + start), mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, squares + count * deviation * deviation, 0.0)
    variance = tl.sum(total, 1) / K
    # Correctly rounded: it multiplies every element.
    return mean, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@jit
def row_moments(  # type: ignore[no-untyped-def]
    out,  # [M,N]
    out_moments,  # [M,2,parts] float32
    M: extent,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PART: tl.constexpr,  # features per mean and squared deviations
):
    """Statistics of a result in memory. Grid: blocks of rows, blocks of features."""
    await_inputs()
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.arange(0, BLOCK_M)
    first_col = tl.program_id(1) * BLOCK_N
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = (rows < M - first_row)[:, None] & (cols < N)[None, :]
    at = out + first_row * N + (rows[:, None] * N + cols[None, :])
    store_row_moments(tl.load(at, mask=mask, other=0.0), out_moments, first_row, rows, first_col, M, N, PART)
