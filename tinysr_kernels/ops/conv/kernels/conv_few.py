"""conv3x3 with few results: a product of all taps with each pixel once, then nine shifted sums.

A tile is read with a border of one pixel; its product with a matrix of 9 * RESULTS columns holds what every pixel gives
to each of its neighbours, and a gather along the pixels brings that to where it is added. So each pixel is loaded, and
put through a GroupNorm before, once a tile where the nine taps of an implicit product do so nine times.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, bias_row, epilogue, round_to, tile_dot
from tinysr_kernels.ops.norm.kernels.norm_silu_prologue import mean_and_gain, norm_silu


@jit
def few(  # type: ignore[no-untyped-def]
    x,  # [N,height,width,CHANNELS]
    weight,  # [RESULTS,3,3,CHANNELS]
    bias,  # [RESULTS] or None
    residual,  # like out, or None
    moments,  # [N,2,CHANNELS], of a GroupNorm with SiLU before, or None
    norm_weight,  # [CHANNELS] or None
    norm_bias,  # [CHANNELS] or None
    out,  # [N,height,width,RESULTS]
    norm_eps,
    height,
    width,
    CHANNELS: tl.constexpr,
    RESULTS: tl.constexpr,
    NORM_WIDTH: tl.constexpr,  # channels of a group
    MEMBERS: tl.constexpr,  # at least NORM_WIDTH
    QUICK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
    PIXELS: tl.constexpr,  # of the tile and its border
    COLUMNS: tl.constexpr,  # likewise
    SLICE: tl.constexpr,
    PLACES: tl.constexpr,  # at least 9 * RESULTS
    OUTPUTS: tl.constexpr,  # at least RESULTS
):
    """Grid: tiles in reading order, samples."""
    await_inputs()
    ROWS: tl.constexpr = PIXELS // COLUMNS
    across = tl.cdiv(width, COLUMNS - 2)
    top = tl.program_id(0) // across * (ROWS - 2) - 1
    left = tl.program_id(0) % across * (COLUMNS - 2) - 1
    sample = tl.program_id(1).to(tl.int64)
    lane = tl.arange(0, PIXELS)
    row = top + lane // COLUMNS
    column = left + lane % COLUMNS
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    base = (sample * height + top) * width + left
    pixel = lane // COLUMNS * width + lane % COLUMNS
    place = tl.arange(0, PLACES)
    tap = place // RESULTS
    sums = tl.full((PIXELS, PLACES), 0.0, tl.float32)
    for start in range(0, CHANNELS, SLICE):
        chan = start + tl.arange(0, SLICE)
        there = chan < CHANNELS
        known = inside[:, None] & there[None, :]
        at = base * CHANNELS + (pixel[:, None] * CHANNELS + chan[None, :])
        rows = tl.load(x + at, mask=known, other=0.0)
        columns = tl.load(
            weight + ((place % RESULTS * 9 + tap)[None, :] * CHANNELS + chan[:, None]),
            mask=(tap < 9)[None, :] & there[:, None],
            other=0.0,
        )
        if moments is not None:
            mean, gain = mean_and_gain(moments, norm_weight, norm_eps, sample, chan, CHANNELS, NORM_WIDTH, MEMBERS)
            shift = tl.load(norm_bias + chan, mask=there, other=0.0).to(tl.float32)
            y = norm_silu(rows, mean[None, :], gain[None, :], shift[None, :], QUICK)
            rows = round_to(tl.where(known, y, 0.0), columns.dtype)
        sums = tile_dot(rows.to(columns.dtype), columns, sums)
    # What belongs to a pixel stands with its neighbour in the tap's direction; beyond the tile nothing is asked for.
    source = lane[:, None] + ((tap // 3 - 1) * COLUMNS + tap % 3 - 1)[None, :]
    shifted = tl.gather(sums, tl.minimum(tl.maximum(source, 0), PIXELS - 1), 0)
    outs = tl.arange(0, OUTPUTS)
    acc = tl.full((PIXELS, OUTPUTS), 0.0, tl.float32)
    for result in tl.static_range(RESULTS):
        own = (place % RESULTS == result) & (tap < 9)
        total = tl.sum(tl.where(own[None, :], shifted, 0.0), 1)
        acc += tl.where(outs[None, :] == result, total[:, None], 0.0)
    inner = (lane >= COLUMNS) & (lane < PIXELS - COLUMNS) & (lane % COLUMNS > 0) & (lane % COLUMNS < COLUMNS - 1)
    known = (inner & inside)[:, None] & (outs[None, :] < RESULTS)
    beta = bias_row(bias, outs, RESULTS, OUTPUTS)
    at = pixel[:, None] * RESULTS + outs[None, :]
    epilogue(acc, beta, residual, out, base * RESULTS, at, known, ACTIVATION, ACTIVATE_RESIDUAL)
