"""The kernels of attention: keys and values in tiles, an online softmax over them, scores never in memory.

Per query, three values are carried from tile to tile: row_max, the largest score so far; row_sum, the sum of
p = 2^(score - row_max); acc, the sum of p times the values. A larger score rescales both sums by alpha. Scores are
exponents of 2: `scale` comes multiplied by log2(e). Everything except the operands of the matmuls is float32.

`flash`: one program computes a tile of queries of one head over all keys. The head dimension is covered by one power of
two or by the sum of two, BLOCK_D1 + BLOCK_D2, with one matmul each: 48 is 32 + 16 and costs a quarter less than 64.
`wide`: for float32 and for heads too wide for `flash`. Scores are summed over the head dimension in steps of BLOCK_K;
one program computes BLOCK_D columns of the result from one of split_k parts of the keys, and `merge_splits` merges the
parts in a fixed order. Every part has a key, so that no row_max stays at minus infinity.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.device_functions import await_inputs, round_to, tile_dot


@jit
def _tile(  # type: ignore[no-untyped-def]
    start,  # one head's queries, keys or values, at the tile's first token
    row,  # [R], tokens relative to start
    count,  # how many tokens are left from start on
    stride,  # elements from token to token
    chan,  # [D], columns of the head
    HEAD_DIM: tl.constexpr,
    MASK_DIM: tl.constexpr,  # whether chan may be HEAD_DIM or larger
    MASK_TOKENS: tl.constexpr,  # whether fewer than R tokens may be left
):
    """The tile [R,D] in qkv's dtype, zero outside."""
    at = start + (row[:, None] * stride + chan[None, :])
    if MASK_DIM:
        mask = (chan < HEAD_DIM)[None, :]
        if MASK_TOKENS:
            mask = mask & (row < count)[:, None]
        v = tl.load(at, mask=mask, other=0.0)
    elif MASK_TOKENS:
        v = tl.load(at, mask=(row < count)[:, None], other=0.0)
    else:
        v = tl.load(at)
    return v


@jit
def _online_softmax(  # type: ignore[no-untyped-def]
    scores,  # [BLOCK_M,BLOCK_N] float32, unscaled
    row_max,  # [BLOCK_M], the largest scaled score so far
    row_sum,  # [BLOCK_M], the sum of p so far
    offs_n,  # [BLOCK_N], keys relative to the tile's first
    count,  # how many keys are left from there on, at least one
    scale,  # its magnitude, times log2(e)
    NEGATIVE: tl.constexpr,  # whether the scale is negative
    MASK_KEYS: tl.constexpr,  # whether fewer than BLOCK_N keys may be left
):
    """p [BLOCK_M,BLOCK_N], the factor alpha that rescales earlier sums, and the new row_max and row_sum."""
    if NEGATIVE:
        scores = -scores
    if MASK_KEYS:
        scores = tl.where((offs_n < count)[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    # One multiply-add per score. The rounding of new_max is the same for all keys and cancels.
    p = tl.exp2(scores * scale - new_max[:, None])
    alpha = tl.exp2(row_max - new_max)
    return p, alpha, new_max, row_sum * alpha + tl.sum(p, 1)


@jit
def flash(  # type: ignore[no-untyped-def]
    qkv,  # [N,tokens,3,heads,HEAD_DIM]
    out,  # [N,tokens,heads,HEAD_DIM]
    scale,  # its magnitude, times log2(e)
    tokens,
    heads,
    NEGATIVE: tl.constexpr,  # whether the scale is negative
    HAS_TAIL: tl.constexpr,  # whether BLOCK_N does not divide tokens
    SEPARATE_TAIL: tl.constexpr,  # whether the keys after the last whole tile then have their own loop
    HEAD_DIM: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_D2: tl.constexpr,  # 0 if BLOCK_D1 covers the head
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: tiles of BLOCK_M queries, heads, samples."""
    await_inputs()
    features = heads * HEAD_DIM
    stride = 3 * features
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d1 = tl.arange(0, BLOCK_D1)
    sample = tl.program_id(2).to(tl.int64) * tokens
    start_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    queries_left = tokens - tl.program_id(0) * BLOCK_M
    # Only a tile's base address may need 64-bit offsets; within the tile, 32-bit offsets take half the registers.
    queries = qkv + (sample + start_m) * stride + tl.program_id(1) * HEAD_DIM
    q1 = _tile(queries, offs_m, queries_left, stride, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, True)
    acc1 = tl.full((BLOCK_M, BLOCK_D1), 0.0, tl.float32)
    if BLOCK_D2 > 0:
        offs_d2 = BLOCK_D1 + tl.arange(0, BLOCK_D2)
        q2 = _tile(queries, offs_m, queries_left, stride, offs_d2, HEAD_DIM, BLOCK_D1 + BLOCK_D2 > HEAD_DIM, True)
        acc2 = tl.full((BLOCK_M, BLOCK_D2), 0.0, tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.full((BLOCK_M,), 0.0, tl.float32)
    # Whole tiles of keys, then the tail with a mask: for any number of tokens the hot loop has no mask.
    MASKED_LOOP: tl.constexpr = HAS_TAIL and not SEPARATE_TAIL
    tail_start = 0 if MASKED_LOOP else tokens // BLOCK_N * BLOCK_N
    for TAIL in tl.static_range(1 if MASKED_LOOP else 0, 2 if HAS_TAIL else 1):
        loop_end = tokens if TAIL else tail_start
        for start_n in tl.range(
            tail_start if TAIL else 0, loop_end, BLOCK_N, num_stages=1 if TAIL and not MASKED_LOOP else NUM_STAGES
        ):
            keys = qkv + (sample + start_n) * stride + (heads + tl.program_id(1)) * HEAD_DIM
            values = keys + features
            keys_left = tokens - start_n
            k = _tile(keys, offs_n, keys_left, stride, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, TAIL)
            scores = tile_dot(q1, tl.trans(k), tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32))
            if BLOCK_D2 > 0:
                k = _tile(keys, offs_n, keys_left, stride, offs_d2, HEAD_DIM, BLOCK_D1 + BLOCK_D2 > HEAD_DIM, TAIL)
                scores = tile_dot(q2, tl.trans(k), scores)
            p, alpha, row_max, row_sum = _online_softmax(
                scores, row_max, row_sum, offs_n, keys_left, scale, NEGATIVE, TAIL
            )
            v = _tile(values, offs_n, keys_left, stride, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, TAIL)
            weights = round_to(p, v.dtype)
            acc1 = tile_dot(weights, v, acc1 * alpha[:, None])
            if BLOCK_D2 > 0:
                v = _tile(values, offs_n, keys_left, stride, offs_d2, HEAD_DIM, BLOCK_D1 + BLOCK_D2 > HEAD_DIM, TAIL)
                acc2 = tile_dot(weights, v, acc2 * alpha[:, None])
    result = out + (sample + start_m) * features + tl.program_id(1) * HEAD_DIM
    inside = (offs_m < queries_left)[:, None]
    at = result + (offs_m[:, None] * features + offs_d1[None, :])
    v = round_to(acc1 / row_sum[:, None], out.dtype.element_ty)
    tl.store(at, v, mask=inside & (offs_d1 < HEAD_DIM)[None, :])
    if BLOCK_D2 > 0:
        at = result + (offs_m[:, None] * features + offs_d2[None, :])
        v = round_to(acc2 / row_sum[:, None], out.dtype.element_ty)
        tl.store(at, v, mask=inside & (offs_d2 < HEAD_DIM)[None, :])


@jit
def wide(  # type: ignore[no-untyped-def]
    qkv,  # [N,tokens,3,heads,HEAD_DIM]
    out,  # [N,tokens,heads,HEAD_DIM], or None if split_k > 1
    scratch_out,  # [N,heads,split_k,tokens,HEAD_DIM] float32: acc of each part; or None
    scratch_max,  # [N,heads,split_k,tokens] float32 or None
    scratch_sum,  # [N,heads,split_k,tokens] float32 or None
    scale,  # its magnitude, times log2(e)
    tokens: extent,
    heads,
    split_keys,  # keys per part, a multiple of BLOCK_N; the last part may have fewer
    split_k: extent,  # parts of the keys
    NEGATIVE: tl.constexpr,  # whether the scale is negative
    HAS_TAIL: tl.constexpr,  # whether BLOCK_N does not divide tokens
    SEPARATE_TAIL: tl.constexpr,  # whether the keys after the last whole tile then have their own loop
    HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: tiles of BLOCK_M queries times split_k times blocks of BLOCK_D columns, heads, samples."""
    await_inputs()
    features = heads * HEAD_DIM
    stride = 3 * features
    tiles = tl.cdiv(tokens, BLOCK_M)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % split_k
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.program_id(0) // tiles // split_k * BLOCK_D + tl.arange(0, BLOCK_D)
    sample = tl.program_id(2).to(tl.int64) * tokens
    start_m = tile.to(tl.int64) * BLOCK_M
    queries_left = tokens - tile * BLOCK_M
    queries = qkv + (sample + start_m) * stride + tl.program_id(1) * HEAD_DIM
    if BLOCK_K >= HEAD_DIM:
        q = _tile(queries, offs_m, queries_left, stride, offs_k, HEAD_DIM, BLOCK_K > HEAD_DIM, True)
    acc = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.full((BLOCK_M,), 0.0, tl.float32)
    loop_end = tl.minimum((split + 1) * split_keys, tokens)
    MASKED_LOOP: tl.constexpr = HAS_TAIL and not SEPARATE_TAIL
    tail_start = split * split_keys if MASKED_LOOP else loop_end // BLOCK_N * BLOCK_N
    for TAIL in tl.static_range(1 if MASKED_LOOP else 0, 2 if HAS_TAIL else 1):
        loop_start = tail_start if TAIL else split * split_keys
        for start_n in tl.range(
            loop_start,
            loop_end if TAIL else tail_start,
            BLOCK_N,
            num_stages=1 if TAIL and not MASKED_LOOP else NUM_STAGES,
        ):
            keys = qkv + (sample + start_n) * stride + (heads + tl.program_id(1)) * HEAD_DIM
            keys_left = tokens - start_n
            scores = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
            if BLOCK_K >= HEAD_DIM:
                k = _tile(keys, offs_n, keys_left, stride, offs_k, HEAD_DIM, BLOCK_K > HEAD_DIM, TAIL)
                scores = tile_dot(q, tl.trans(k), scores)
            else:
                # The queries are loaded again, from the cache, for every tile of keys: no program could hold them.
                for piece in range(0, HEAD_DIM, BLOCK_K):
                    q = _tile(
                        queries, offs_m, queries_left, stride, piece + offs_k, HEAD_DIM, HEAD_DIM % BLOCK_K > 0, True
                    )
                    k = _tile(keys, offs_n, keys_left, stride, piece + offs_k, HEAD_DIM, HEAD_DIM % BLOCK_K > 0, TAIL)
                    scores = tile_dot(q, tl.trans(k), scores)
            p, alpha, row_max, row_sum = _online_softmax(
                scores, row_max, row_sum, offs_n, keys_left, scale, NEGATIVE, TAIL
            )
            v = _tile(keys + features, offs_n, keys_left, stride, offs_d, HEAD_DIM, HEAD_DIM % BLOCK_D > 0, TAIL)
            acc = tile_dot(round_to(p, v.dtype), v, acc * alpha[:, None])
    inside = offs_m < queries_left
    mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
    if scratch_out is None:
        at = out + (sample + start_m) * features + tl.program_id(1) * HEAD_DIM
        v = round_to(acc / row_sum[:, None], out.dtype.element_ty)
        tl.store(at + (offs_m[:, None] * features + offs_d[None, :]), v, mask=mask)
    else:
        row = ((tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)) * split_k + split) * tokens + start_m
        tl.store(scratch_out + row * HEAD_DIM + (offs_m[:, None] * HEAD_DIM + offs_d[None, :]), acc, mask=mask)
        # Programs of other columns have the same two values.
        inside = inside & (tl.program_id(0) < tiles * split_k)
        tl.store(scratch_max + row + offs_m, row_max, mask=inside)
        tl.store(scratch_sum + row + offs_m, row_sum, mask=inside)


@jit
def merge_splits(  # type: ignore[no-untyped-def]
    scratch_out,  # [N,heads,split_k,tokens,HEAD_DIM] float32
    scratch_max,  # [N,heads,split_k,tokens] float32
    scratch_sum,  # [N,heads,split_k,tokens] float32
    out,  # [N,tokens,heads,HEAD_DIM]
    tokens: extent,
    heads,
    split_k: extent,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least HEAD_DIM
    BLOCK_M: tl.constexpr,
):
    """Grid: tiles of BLOCK_M queries, heads, samples. Parts are merged in order, as tiles of keys are."""
    await_inputs()
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    sample = tl.program_id(2).to(tl.int64)
    start_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    inside = offs_m < tokens - tl.program_id(0) * BLOCK_M
    mask = inside[:, None] & (offs_d < HEAD_DIM)[None, :]
    acc = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.full((BLOCK_M,), 0.0, tl.float32)
    for split in range(split_k):
        row = ((sample * heads + tl.program_id(1)) * split_k + split) * tokens + start_m
        split_max = tl.load(scratch_max + row + offs_m, mask=inside, other=0.0)
        split_sum = tl.load(scratch_sum + row + offs_m, mask=inside, other=1.0)
        v = tl.load(scratch_out + row * HEAD_DIM + (offs_m[:, None] * HEAD_DIM + offs_d[None, :]), mask=mask, other=0.0)
        new_max = tl.maximum(row_max, split_max)
        alpha = tl.exp2(row_max - new_max)
        beta = tl.exp2(split_max - new_max)
        row_sum = row_sum * alpha + split_sum * beta
        acc = acc * alpha[:, None] + v * beta[:, None]
        row_max = new_max
    features = heads * HEAD_DIM
    at = out + (sample * tokens + start_m) * features + tl.program_id(1) * HEAD_DIM
    v = round_to(acc / row_sum[:, None], out.dtype.element_ty)
    tl.store(at + (offs_m[:, None] * features + offs_d[None, :]), v, mask=mask)
