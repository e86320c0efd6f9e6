"""The kernels of attention: keys in tiles, softmax as they pass, scores never in memory.

Per query row three things are carried from tile to tile: the highest score so far, the sum of the powers of two below
it, and the same sum with each power times its value. A higher score rescales both sums. Scores are counted in powers of
two: `scale` comes multiplied by log2(e). Everything but the operands of the products is float32.

`flash`: a program has a tile of queries of one head over all keys. The head's width is covered by two powers of two or
by one, FIRST + SECOND, each with a product of its own: 48 is 32 + 16 and does a quarter less than padded to 64.
`wide`: heads too wide for that, and float32. Scores are summed over the width in slices of DEPTH; a program makes
COLUMNS columns of the result from one part of the keys, and `merge` puts the parts together in their order. Every part
has a key, so that no highest score stays at minus infinity.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, round_to, tile_dot


@jit
def _tile(  # type: ignore[no-untyped-def]
    start,  # one head's queries, keys or values at the tile's first token
    lane,  # [ROWS]
    count,  # tokens there are from the first on
    stride,  # elements from token to token
    chan,  # [CHANNELS] within the head
    WIDTH: tl.constexpr,  # of the head
    CUT: tl.constexpr,  # whether chan may reach beyond the head
    RAGGED: tl.constexpr,  # whether fewer than ROWS tokens may be left
):
    """The tile [ROWS,CHANNELS], zero where there is no such token or channel."""
    at = start + (lane[:, None] * stride + chan[None, :])
    if CUT:
        known = (chan < WIDTH)[None, :]
        if RAGGED:
            known = known & (lane < count)[:, None]
        v = tl.load(at, mask=known, other=0.0)
    elif RAGGED:
        v = tl.load(at, mask=(lane < count)[:, None], other=0.0)
    else:
        v = tl.load(at)
    return v


@jit
def _weigh(  # type: ignore[no-untyped-def]
    scores,  # [ROWS,KEYS] float32, unscaled
    highest,  # [ROWS] of the scaled scores so far
    total,  # [ROWS] of the powers so far
    lane,  # [KEYS]
    count,  # keys there are from the tile's first on: one or more
    scale,  # not negative
    NEGATIVE: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Powers [ROWS,KEYS], what the sums so far have to be multiplied with, and the new highest and total."""
    if NEGATIVE:
        scores = -scores
    if RAGGED:
        scores = tl.where((lane < count)[None, :], scores, float("-inf"))
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    # One multiply-add a score. Whatever the rounding of `new`, it is the same for all keys and cancels.
    powers = tl.exp2(scores * scale - new[:, None])
    again = tl.exp2(highest - new)
    return powers, again, new, total * again + tl.sum(powers, 1)


@jit
def flash(  # type: ignore[no-untyped-def]
    qkv,  # [N,tokens,3,heads,WIDTH]
    out,  # [N,tokens,heads,WIDTH]
    scale,  # its magnitude, times log2(e)
    tokens,
    heads,
    NEGATIVE: tl.constexpr,  # whether the scale is
    RAGGED: tl.constexpr,  # whether KEYS does not divide tokens
    APART: tl.constexpr,  # whether the keys behind the last whole tile then have a loop of their own
    WIDTH: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,  # 0 where FIRST covers the head
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles of ROWS queries, heads, samples."""
    await_inputs()
    features = heads * WIDTH
    stride = 3 * features
    lane = tl.arange(0, ROWS)
    key_lane = tl.arange(0, KEYS)
    front = tl.arange(0, FIRST)
    sample = tl.program_id(2).to(tl.int64) * tokens
    top = tl.program_id(0).to(tl.int64) * ROWS
    rows_left = tokens - tl.program_id(0) * ROWS
    # Only the way to a tile may need 64 bits; within it, offsets of 32 take half the registers.
    queries = qkv + (sample + top) * stride + tl.program_id(1) * WIDTH
    first_q = _tile(queries, lane, rows_left, stride, front, WIDTH, FIRST > WIDTH, True)
    first_sum = tl.full((ROWS, FIRST), 0.0, tl.float32)
    if SECOND > 0:
        back = FIRST + tl.arange(0, SECOND)
        second_q = _tile(queries, lane, rows_left, stride, back, WIDTH, FIRST + SECOND > WIDTH, True)
        second_sum = tl.full((ROWS, SECOND), 0.0, tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    # Whole tiles of keys, then the rest with a mask: whatever the number of tokens, the hot loop has none.
    ALONG: tl.constexpr = RAGGED and not APART
    whole = 0 if ALONG else tokens // KEYS * KEYS
    for REST in tl.static_range(1 if ALONG else 0, 2 if RAGGED else 1):
        end = tokens if REST else whole
        for begin in tl.range(whole if REST else 0, end, KEYS, num_stages=1 if REST and not ALONG else STAGES):
            keys = qkv + (sample + begin) * stride + (heads + tl.program_id(1)) * WIDTH
            values = keys + features
            left = tokens - begin
            k = _tile(keys, key_lane, left, stride, front, WIDTH, FIRST > WIDTH, REST)
            scores = tile_dot(first_q, tl.trans(k), tl.full((ROWS, KEYS), 0.0, tl.float32))
            if SECOND > 0:
                k = _tile(keys, key_lane, left, stride, back, WIDTH, FIRST + SECOND > WIDTH, REST)
                scores = tile_dot(second_q, tl.trans(k), scores)
            powers, again, highest, total = _weigh(scores, highest, total, key_lane, left, scale, NEGATIVE, REST)
            v = _tile(values, key_lane, left, stride, front, WIDTH, FIRST > WIDTH, REST)
            weights = round_to(powers, v.dtype)
            first_sum = tile_dot(weights, v, first_sum * again[:, None])
            if SECOND > 0:
                v = _tile(values, key_lane, left, stride, back, WIDTH, FIRST + SECOND > WIDTH, REST)
                second_sum = tile_dot(weights, v, second_sum * again[:, None])
    result = out + (sample + top) * features + tl.program_id(1) * WIDTH
    there = (lane < rows_left)[:, None]
    at = result + (lane[:, None] * features + front[None, :])
    v = round_to(first_sum / total[:, None], out.dtype.element_ty)
    tl.store(at, v, mask=there & (front < WIDTH)[None, :])
    if SECOND > 0:
        at = result + (lane[:, None] * features + back[None, :])
        v = round_to(second_sum / total[:, None], out.dtype.element_ty)
        tl.store(at, v, mask=there & (back < WIDTH)[None, :])


@jit
def wide(  # type: ignore[no-untyped-def]
    qkv,  # [N,tokens,3,heads,WIDTH]
    out,  # [N,tokens,heads,WIDTH], or None where there are several parts
    scratch_out,  # [N,heads,parts,tokens,WIDTH] float32: sums of powers times values; or None
    scratch_highest,  # [N,heads,parts,tokens] float32 or None
    scratch_total,  # [N,heads,parts,tokens] float32 or None
    scale,  # its magnitude, times log2(e)
    tokens,
    heads,
    part,  # keys of a part, a multiple of KEYS; the last may have fewer
    parts,
    NEGATIVE: tl.constexpr,  # whether the scale is
    RAGGED: tl.constexpr,  # whether KEYS does not divide tokens
    APART: tl.constexpr,  # whether the keys behind the last whole tile then have a loop of their own
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: tiles of ROWS queries times parts times blocks of COLUMNS, heads, samples."""
    await_inputs()
    features = heads * WIDTH
    stride = 3 * features
    tiles = tl.cdiv(tokens, ROWS)
    tile = tl.program_id(0) % tiles
    number = tl.program_id(0) // tiles % parts
    lane = tl.arange(0, ROWS)
    key_lane = tl.arange(0, KEYS)
    inner = tl.arange(0, DEPTH)
    column = tl.program_id(0) // tiles // parts * COLUMNS + tl.arange(0, COLUMNS)
    sample = tl.program_id(2).to(tl.int64) * tokens
    top = tile.to(tl.int64) * ROWS
    rows_left = tokens - tile * ROWS
    queries = qkv + (sample + top) * stride + tl.program_id(1) * WIDTH
    if DEPTH >= WIDTH:
        q = _tile(queries, lane, rows_left, stride, inner, WIDTH, DEPTH > WIDTH, True)
    sums = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    end = tl.minimum((number + 1) * part, tokens)
    ALONG: tl.constexpr = RAGGED and not APART
    whole = number * part if ALONG else end // KEYS * KEYS
    for REST in tl.static_range(1 if ALONG else 0, 2 if RAGGED else 1):
        first = whole if REST else number * part
        for begin in tl.range(first, end if REST else whole, KEYS, num_stages=1 if REST and not ALONG else STAGES):
            keys = qkv + (sample + begin) * stride + (heads + tl.program_id(1)) * WIDTH
            left = tokens - begin
            scores = tl.full((ROWS, KEYS), 0.0, tl.float32)
            if DEPTH >= WIDTH:
                k = _tile(keys, key_lane, left, stride, inner, WIDTH, DEPTH > WIDTH, REST)
                scores = tile_dot(q, tl.trans(k), scores)
            else:
                # The queries come from the cache again for every tile of keys: no program could hold them.
                for piece in range(0, WIDTH, DEPTH):
                    q = _tile(queries, lane, rows_left, stride, piece + inner, WIDTH, WIDTH % DEPTH > 0, True)
                    k = _tile(keys, key_lane, left, stride, piece + inner, WIDTH, WIDTH % DEPTH > 0, REST)
                    scores = tile_dot(q, tl.trans(k), scores)
            powers, again, highest, total = _weigh(scores, highest, total, key_lane, left, scale, NEGATIVE, REST)
            v = _tile(keys + features, key_lane, left, stride, column, WIDTH, WIDTH % COLUMNS > 0, REST)
            sums = tile_dot(round_to(powers, v.dtype), v, sums * again[:, None])
    there = lane < rows_left
    known = there[:, None] & (column < WIDTH)[None, :]
    if scratch_out is None:
        at = out + (sample + top) * features + tl.program_id(1) * WIDTH
        v = round_to(sums / total[:, None], out.dtype.element_ty)
        tl.store(at + (lane[:, None] * features + column[None, :]), v, mask=known)
    else:
        row = ((tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)) * parts + number) * tokens + top
        tl.store(scratch_out + row * WIDTH + (lane[:, None] * WIDTH + column[None, :]), sums, mask=known)
        # Programs of other columns have the same two numbers.
        there = there & (tl.program_id(0) < tiles * parts)
        tl.store(scratch_highest + row + lane, highest, mask=there)
        tl.store(scratch_total + row + lane, total, mask=there)


@jit
def merge(  # type: ignore[no-untyped-def]
    scratch_out,  # [N,heads,parts,tokens,WIDTH] float32
    scratch_highest,  # [N,heads,parts,tokens] float32
    scratch_total,  # [N,heads,parts,tokens] float32
    out,  # [N,tokens,heads,WIDTH]
    tokens,
    heads,
    parts,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,  # at least WIDTH
    ROWS: tl.constexpr,
):
    """Grid: tiles of ROWS queries, heads, samples. Parts are taken in their order, as tiles of keys are."""
    await_inputs()
    lane = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    sample = tl.program_id(2).to(tl.int64)
    top = tl.program_id(0).to(tl.int64) * ROWS
    there = lane < tokens - tl.program_id(0) * ROWS
    known = there[:, None] & (column < WIDTH)[None, :]
    sums = tl.full((ROWS, COLUMNS), 0.0, tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.full((ROWS,), 0.0, tl.float32)
    for number in range(parts):
        row = ((sample * heads + tl.program_id(1)) * parts + number) * tokens + top
        high = tl.load(scratch_highest + row + lane, mask=there, other=0.0)
        powers = tl.load(scratch_total + row + lane, mask=there, other=1.0)
        v = tl.load(scratch_out + row * WIDTH + (lane[:, None] * WIDTH + column[None, :]), mask=known, other=0.0)
        new = tl.maximum(highest, high)
        again = tl.exp2(highest - new)
        weight = tl.exp2(high - new)
        total = total * again + powers * weight
        sums = sums * again[:, None] + v * weight[:, None]
        highest = new
    features = heads * WIDTH
    at = out + (sample * tokens + top) * features + tl.program_id(1) * WIDTH
    v = round_to(sums / total[:, None], out.dtype.element_ty)
    tl.store(at + (lane[:, None] * features + column[None, :]), v, mask=known)
