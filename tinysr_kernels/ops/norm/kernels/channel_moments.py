"""Moments of a convolution's result, taken while its tiles are still in registers, and their merging.

A tile leaves three numbers for each channel: how many pixels, their mean, the sum of their squared deviations. `merge`
puts them together by Chan's rule, in a fixed order and without atomics.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs


@jit
def _total(v):  # type: ignore[no-untyped-def]
    """The sum of each column."""
    return tl.sum(v, 0)


@_total.interpreted
def _in_parts(v):  # type: ignore[no-untyped-def]
    # The interpreter adds row by row, a GPU in a tree, which loses less: 16 columns of sums come nearer to that.
    return tl.sum(tl.sum(tl.reshape(v, (16, v.shape[0] // 16, v.shape[1])), 1), 0)


@jit
def tile_moments(v, inside):  # type: ignore[no-untyped-def]
    """Pixels, mean [OUTPUTS] and squared deviations [OUTPUTS] of a float32 tile [PIXELS,OUTPUTS], where inside."""
    count = tl.sum(inside.to(tl.float32), 0)
    known = tl.where(inside[:, None], v, 0.0)
    mean = _total(known) / tl.maximum(count, 1.0)
    deviation = tl.where(inside[:, None], v - mean[None, :], 0.0)
    # What the sum has lost by rounding shows in the sum of the deviations.
    lost = _total(deviation) / tl.maximum(count, 1.0)
    return count, mean + lost, _total(deviation * deviation)


@jit
def merge_moments(count, mean, squares, more, more_mean, more_squares):  # type: ignore[no-untyped-def]
    """Chan's rule: the moments of two sets of pixels together."""
    total = count + more
    share = more / tl.maximum(total, 1.0)
    delta = more_mean - mean
    return total, mean + delta * share, squares + more_squares + delta * delta * (count * share)


@jit
def group_moments(count, mean, squares, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and squared deviations of groups of WIDTH neighbouring channels, all of `count` pixels each."""
    means = tl.reshape(mean, (mean.shape[0] // WIDTH, WIDTH))
    center = tl.sum(means, 1) / WIDTH
    deviation = means - center[:, None]
    within = tl.sum(tl.reshape(squares, (squares.shape[0] // WIDTH, WIDTH)), 1)
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
def take(  # type: ignore[no-untyped-def]
    out,  # [N,pixels,outputs]
    scratch_moments,  # [N,3,outputs,tl.num_programs(0)] float32
    pixels,
    outputs,
    PIXELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Of a result in memory. Grid: blocks of pixels, blocks of channels, samples."""
    await_inputs()
    start = tl.program_id(0) * PIXELS
    lane = tl.arange(0, PIXELS)
    inside = start + lane < pixels
    outs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    sample = tl.program_id(2).to(tl.int64)
    known = inside[:, None] & (outs[None, :] < outputs)
    at = (sample * pixels + start) * outputs + (lane[:, None] * outputs + outs[None, :])
    v = tl.load(out + at, mask=known, other=0.0).to(tl.float32)
    count, mean, squares = tile_moments(v, inside)
    store_moments(scratch_moments, sample, tl.program_id(0), tl.num_programs(0), outs, outputs, count, mean, squares)


@jit
def merge(  # type: ignore[no-untyped-def]
    scratch_moments,  # [N,3,channels,parts] float32: pixels, mean, squared deviations
    scratch_mean,  # float32, where sample n's channel c is at n * stride + c
    scratch_variance,  # likewise
    stride,
    channels,
    parts,
    PARTS: tl.constexpr,
):
    """Grid: channels, samples."""
    await_inputs()
    chan = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    at = scratch_moments + (sample * 3 * channels + chan) * parts
    step = channels * parts
    lane = tl.arange(0, PARTS)
    # Means are counted from the first one: what is then rounded is small.
    first = tl.load(at + step)
    total = tl.full((PARTS,), 0.0, tl.float32)
    weighted = tl.full((PARTS,), 0.0, tl.float32)
    for start in range(0, parts, PARTS):
        known = start + lane < parts
        count = tl.load(at + start + lane, mask=known, other=0.0)
        total += count
        weighted += count * (tl.load(at + step + start + lane, mask=known, other=0.0) - first)
    pixels = tl.sum(total, 0)
    mean = first + tl.sum(weighted, 0) / pixels
    squares = tl.full((PARTS,), 0.0, tl.float32)
    for start in range(0, parts, PARTS):
        known = start + lane < parts
        count = tl.load(at + start + lane, mask=known, other=0.0)
        deviation = tl.load(at + step + start + lane, mask=known, other=0.0) - mean
        squares += tl.load(at + 2 * step + start + lane, mask=known, other=0.0) + count * deviation * deviation
    tl.store(scratch_mean + sample * stride + chan, mean)
    tl.store(scratch_variance + sample * stride + chan, tl.sum(squares, 0) / pixels)
