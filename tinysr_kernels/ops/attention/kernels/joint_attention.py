"""The kernel of joint_attention: `flash` of attention.py with the tokens of two streams for one sequence.

A program computes a tile of queries of one head and one stream over the keys of the image, then over those of the text.
Both streams stay where their projections wrote them, and the results are stored one stream after the other, so that
neither is copied to stand beside the other. Names and the cover of a head by one or two powers of two as in
`attention.py`.
"""

from __future__ import annotations

from tinysr_kernels.launch.kernel import extent, jit, tl
from tinysr_kernels.ops.attention.kernels.attention import _online_softmax, _tile
from tinysr_kernels.ops.device_functions import await_inputs, round_to, tile_dot


@jit
def joint(  # type: ignore[no-untyped-def]
    image,  # [N,tokens,3,heads,HEAD_DIM]
    text,  # [N or 1,context,3,heads,HEAD_DIM], or [...,2,...] without queries
    out,  # [N*tokens,heads,HEAD_DIM], then [N*context,heads,HEAD_DIM] if the text has queries
    scale,  # its magnitude, times log2(e)
    tokens,  # of the image
    context,  # tokens of the text
    text_step: extent,  # tokens from one sample's text to the next's: context, or 0 if all samples share it
    heads,
    NEGATIVE: tl.constexpr,  # whether the scale is negative
    QUERIES: tl.constexpr,  # whether the text has queries
    IMAGE_TAIL: tl.constexpr,  # whether BLOCK_N does not divide tokens
    TEXT_TAIL: tl.constexpr,  # whether BLOCK_N does not divide context
    HEAD_DIM: tl.constexpr,
    BLOCK_D1: tl.constexpr,
    BLOCK_D2: tl.constexpr,  # 0 if BLOCK_D1 covers the head
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Grid: tiles of BLOCK_M queries of the image, then of the text if it has queries; heads; samples."""
    await_inputs()
    features = heads * HEAD_DIM
    head = tl.program_id(1)
    sample = tl.program_id(2).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d1 = tl.arange(0, BLOCK_D1)
    # Only a tile's base address may need 64-bit offsets.
    start_m = tl.program_id(0) * BLOCK_M
    queries_left = tokens - start_m
    first = sample * tokens + start_m
    queries = image + first * 3 * features + head * HEAD_DIM
    if QUERIES:
        tiles = tl.cdiv(tokens, BLOCK_M)
        of_text = tl.program_id(0) >= tiles
        start_m = (tl.program_id(0) - tiles) * BLOCK_M
        queries_left = tl.where(of_text, context - start_m, queries_left)
        queries = tl.where(of_text, text + (sample * text_step + start_m) * 3 * features + head * HEAD_DIM, queries)
        first = tl.where(of_text, tl.num_programs(2).to(tl.int64) * tokens + sample * context + start_m, first)
    q1 = _tile(queries, offs_m, queries_left, 3 * features, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, True)
    acc1 = tl.full((BLOCK_M, BLOCK_D1), 0.0, tl.float32)
    MASK_D2: tl.constexpr = BLOCK_D1 + BLOCK_D2 > HEAD_DIM
    if BLOCK_D2 > 0:
        offs_d2 = BLOCK_D1 + tl.arange(0, BLOCK_D2)
        q2 = _tile(queries, offs_m, queries_left, 3 * features, offs_d2, HEAD_DIM, MASK_D2, True)
        acc2 = tl.full((BLOCK_M, BLOCK_D2), 0.0, tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.full((BLOCK_M,), 0.0, tl.float32)
    for TEXT in tl.static_range(0, 2):
        PARTS = 2 if TEXT and not QUERIES else 3  # keys and values are the last two
        stride = PARTS * features
        count = context if TEXT else tokens
        before = sample * (text_step if TEXT else tokens)
        source = (text if TEXT else image) + ((PARTS - 2) * heads + head) * HEAD_DIM
        for start_n in tl.range(0, count, BLOCK_N, num_stages=NUM_STAGES):
            keys = source + (before + start_n) * stride
            values = keys + features
            left = count - start_n
            # Which mask is a constant is said where it is needed: in a variable Triton would make it a value.
            k = _tile(
                keys, offs_n, left, stride, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, TEXT_TAIL if TEXT else IMAGE_TAIL
            )
            scores = tile_dot(q1, tl.trans(k), tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32))
            if BLOCK_D2 > 0:
                k = _tile(keys, offs_n, left, stride, offs_d2, HEAD_DIM, MASK_D2, TEXT_TAIL if TEXT else IMAGE_TAIL)
                scores = tile_dot(q2, tl.trans(k), scores)
            p, alpha, row_max, row_sum = _online_softmax(
                scores, row_max, row_sum, offs_n, left, scale, NEGATIVE, TEXT_TAIL if TEXT else IMAGE_TAIL
            )
            v = _tile(
                values, offs_n, left, stride, offs_d1, HEAD_DIM, BLOCK_D1 > HEAD_DIM, TEXT_TAIL if TEXT else IMAGE_TAIL
            )
            weights = round_to(p, v.dtype)
            acc1 = tile_dot(weights, v, acc1 * alpha[:, None])
            if BLOCK_D2 > 0:
                v = _tile(values, offs_n, left, stride, offs_d2, HEAD_DIM, MASK_D2, TEXT_TAIL if TEXT else IMAGE_TAIL)
                acc2 = tile_dot(weights, v, acc2 * alpha[:, None])
    result = out + first * features + head * HEAD_DIM
    inside = (offs_m < queries_left)[:, None]
    at_d1 = result + (offs_m[:, None] * features + offs_d1[None, :])
    mixed = round_to(acc1 / row_sum[:, None], out.dtype.element_ty)
    tl.store(at_d1, mixed, mask=inside & (offs_d1 < HEAD_DIM)[None, :])
    if BLOCK_D2 > 0:
        at_d2 = result + (offs_m[:, None] * features + offs_d2[None, :])
        mixed = round_to(acc2 / row_sum[:, None], out.dtype.element_ty)
        tl.store(at_d2, mixed, mask=inside & (offs_d2 < HEAD_DIM)[None, :])
