"""Per-channel statistics of a convolution's result, computed while its tiles are in registers, and their merging.

A tile stores three numbers per channel: the number of pixels, their mean, the sum of their squared deviations. `merge`
merges them by Chan's rule, in a fixed order and without atomics.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs


@jit
def _total(v):  # type: ignore[no-untyped-def]
    """The sum of each column."""
    return tl.sum(v, 0)


@_total.interpreted
def _in_parts(v):  # type: ignore[no-untyped-def]
    # The interpreter adds row by row, a GPU in a tree, which loses less: 16 partial sums are closer to that.
    return tl.sum(tl.sum(tl.reshape(v, (16, v.shape[0] // 16, v.shape[1])), 1), 0)


@jit
def tile_moments(v, inside, count):  # type: ignore[no-untyped-def]
    """Mean [BLOCK_N] and squared deviations [BLOCK_N] of a float32 tile [BLOCK_M,BLOCK_N].

    inside: [BLOCK_M], which of its pixels count; count: their number, float32, at least 1.
    """
    known = tl.where(inside[:, None], v, 0.0)
    mean = _total(known) / count
    deviation = tl.where(inside[:, None], v - mean[None, :], 0.0)
    # The sum of the deviations recovers what the first sum lost by rounding.
    lost = _total(deviation) / count
    return mean + lost, _total(deviation * deviation)


@jit
def group_moments(count, mean, squares, GROUP_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and squared deviations of groups of GROUP_SIZE adjacent channels of `count` pixels each."""
    means = tl.reshape(mean, (mean.shape[0] // GROUP_SIZE, GROUP_SIZE))
    center = tl.sum(means, 1) / GROUP_SIZE
    deviation = means - center[:, None]
    within = tl.sum(tl.reshape(squares, (squares.shape[0] // GROUP_SIZE, GROUP_SIZE)), 1)
    return center, within + count * tl.sum(deviation * deviation, 1)


@jit
def store_moments(scratch_moments, sample, part, parts, outs, outputs, count, mean, squares):  # type: ignore[no-untyped-def]
    """Store a tile's moments as number `part` in scratch_moments [N,3,outputs,parts] float32."""
    at = scratch_moments + sample * 3 * outputs * parts + outs.to(tl.int64) * parts + part
    step = outputs * parts
    known = outs < outputs
    tl.store(at, mean * 0.0 + count, mask=known)
    tl.store(at + step, mean, mask=known)
    tl.store(at + 2 * step, squares, mask=known)


@jit
def block_moments(  # type: ignore[no-untyped-def]
    out,  # [N,pixels,outputs]
    scratch_moments,  # [N,3,outputs,tl.num_programs(0)] float32
    pixels: extent,
    outputs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Statistics of blocks of pixels of an image in memory. Grid: blocks of pixels, blocks of channels, samples."""
    await_inputs()
    start = tl.program_id(0) * BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    inside = start + lane < pixels
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    sample = tl.program_id(2).to(tl.int64)
    known = inside[:, None] & (outs[None, :] < outputs)
    at = (sample * pixels + start) * outputs + (lane[:, None] * outputs + outs[None, :])
    v = tl.load(out + at, mask=known, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - start, BLOCK_M).to(tl.float32)
    mean, squares = tile_moments(v, inside, count)
    store_moments(scratch_moments, sample, tl.program_id(0), tl.num_programs(0), outs, outputs, count, mean, squares)


@jit
def merge(  # type: ignore[no-untyped-def]
    scratch_moments,  # [N,3,channels,parts] float32: count, mean, squared deviations
    scratch_mean,  # float32, element n * stride + c for channel c of sample n
    scratch_variance,  # float32, the same layout; biased variance
    stride,
    channels,
    parts,
    BLOCK_PARTS: tl.constexpr,  # parts per step
):
    """Grid: channels, samples."""
    await_inputs()
    chan = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    at = scratch_moments + (sample * 3 * channels + chan) * parts
    step = channels * parts
    lane = tl.arange(0, BLOCK_PARTS)
    # Means relative to the first one: the rounding errors are then small.
    first = tl.load(at + step)
    total = tl.full((BLOCK_PARTS,), 0.0, tl.float32)
    weighted = tl.full((BLOCK_PARTS,), 0.0, tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        known = start + lane < parts
        count = tl.load(at + start + lane, mask=known, other=0.0)
        total += count
        weighted += count * (tl.load(at + step + start + lane, mask=known, other=0.0) - first)
    pixels = tl.sum(total, 0)
    mean = first + tl.sum(weighted, 0) / pixels
    squares = tl.full((BLOCK_PARTS,), 0.0, tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        known = start + lane < parts
        count = tl.load(at + start + lane, mask=known, other=0.0)
        deviation = tl.load(at + step + start + lane, mask=known, other=0.0) - mean
        squares += tl.load(at + 2 * step + start + lane, mask=known, other=0.0) + count * deviation * deviation
    tl.store(scratch_mean + sample * stride + chan, mean)
    tl.store(scratch_variance + sample * stride + chan, tl.sum(squares, 0) / pixels)
