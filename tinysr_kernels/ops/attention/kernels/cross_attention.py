"""The kernel of cross_attention: few keys that all samples share, an online softmax over tiles of them.

A program computes a tile of queries of one head. Keys and values, 10 KB each for the 77 tokens of a prompt and heads of
64, come from the caches; the queries are read and the result is stored once. Names and the cover of a head by one or
two powers of two as in `attention.py`, whose `flash` this is with other addresses.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.attention.kernels.attention import _online_softmax, _tile
from tinysr_kernels.ops.device_functions import await_inputs, round_to, tile_dot


@jit
def cross(  # type: ignore[no-untyped-def]
    q,  # [N,tokens,heads,HEAD_DIM]
    keys,  # [heads,context,HEAD_DIM]
    values,  # [heads,context,HEAD_DIM]
    out,  # [N,tokens,heads,HEAD_DIM]
    scale,  # its magnitude, times log2(e)
    tokens,
    context,  # tokens of the prompt
    heads,
    NEGATIVE: tl.constexpr,  # whether the scale is negative
    HAS_TAIL: tl.constexpr,  # whether BLOCK_N does not divide the context
    HEAD_DIM: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_D2: tl.constexpr,  # 0 if BLOCK_D1 covers the head
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: tiles of BLOCK_M queries, heads, samples."""
    await_inputs()
    stride = heads * HEAD_DIM
    head = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d1 = tl.arange(0, BLOCK_D1)
    # Only a tile's base address may need 64-bit offsets.
    first = tl.program_id(2).to(tl.int64) * tokens + tl.program_id(0).to(tl.int64) * BLOCK_M
    queries_left = tokens - tl.program_id(0) * BLOCK_M
    queries = q + first * stride + head * HEAD_DIM
    q1 = _tile(queries, offs_m, queries_left, stride, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, True)
    acc1 = tl.full((BLOCK_M, BLOCK_D1), 0.0, tl.float32)
    if BLOCK_D2 > 0:
        offs_d2 = BLOCK_D1 + tl.arange(0, BLOCK_D2)
        q2 = _tile(queries, offs_m, queries_left, stride, offs_d2, HEAD_DIM, BLOCK_D1 + BLOCK_D2 > HEAD_DIM, True)
        acc2 = tl.full((BLOCK_M, BLOCK_D2), 0.0, tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.full((BLOCK_M,), 0.0, tl.float32)
    keys += head * context * HEAD_DIM
    values += head * context * HEAD_DIM
    for start in tl.range(0, context, BLOCK_N, num_stages=NUM_STAGES):
        at, left = start * HEAD_DIM, context - start
        k = _tile(keys + at, offs_n, left, HEAD_DIM, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, HAS_TAIL)
        scores = tile_dot(q1, tl.trans(k), tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32))
        if BLOCK_D2 > 0:
            k = _tile(keys + at, offs_n, left, HEAD_DIM, offs_d2, HEAD_DIM, BLOCK_D1 + BLOCK_D2 > HEAD_DIM, HAS_TAIL)
            scores = tile_dot(q2, tl.trans(k), scores)
        p, alpha, row_max, row_sum = _online_softmax(scores, row_max, row_sum, offs_n, left, scale, NEGATIVE, HAS_TAIL)
        v = _tile(values + at, offs_n, left, HEAD_DIM, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, HAS_TAIL)
        weights = round_to(p, v.dtype)
        acc1 = tile_dot(weights, v, acc1 * alpha[:, None])
        if BLOCK_D2 > 0:
            v = _tile(values + at, offs_n, left, HEAD_DIM, offs_d2, HEAD_DIM, BLOCK_D1 + BLOCK_D2 > HEAD_DIM, HAS_TAIL)
            acc2 = tile_dot(weights, v, acc2 * alpha[:, None])
    result = out + first * stride + head * HEAD_DIM
    inside = (offs_m < queries_left)[:, None]
    at_d1 = result + (offs_m[:, None] * stride + offs_d1[None, :])
    mixed = round_to(acc1 / row_sum[:, None], out.dtype.element_ty)
    tl.store(at_d1, mixed, mask=inside & (offs_d1 < HEAD_DIM)[None, :])
    if BLOCK_D2 > 0:
        at_d2 = result + (offs_m[:, None] * stride + offs_d2[None, :])
        mixed = round_to(acc2 / row_sum[:, None], out.dtype.element_ty)
        tl.store(at_d2, mixed, mask=inside & (offs_d2 < HEAD_DIM)[None, :])
