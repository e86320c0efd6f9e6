"""The kernel of quantize_rows and layer_norm_quantize, and the rounding to e4m3 that linear_fp8 shares."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.device_functions import await_inputs


@jit
def e4m3(v):  # type: ignore[no-untyped-def]
    """A float32 tile in e4m3: to the nearest, ties to even, saturating at 448; NaN stays."""
    # On sm_89 Triton's own conversion takes the detour of float16, which rounds twice.
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 low, high;
        cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
        cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
        mov.b32 $0, {low, high};
        }""",
        "=r,f,f,f,f",
        [v],
        dtype=tl.float8e4nv,
        is_pure=True,
        pack=4,
    )


@e4m3.interpreted
def _e4m3(v):  # type: ignore[no-untyped-def]
    # The interpreter rounds ties away, drops subnormals and wraps above 448, so the eight bits are put together here.
    bits = v.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(v), 448.0)
    # The exponent, at least that of the subnormals; the last place of the result is 2^(exponent - 3).
    exponent = tl.maximum((bits >> 23) & 255, 121)
    unit = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    # Adding 2^23 leaves no fraction bits, and rounds to even.
    nearest = tl.minimum((size / unit + 8388608.0 - 8388608.0) * unit, 448.0)
    parts = nearest.to(tl.int32, bitcast=True)
    normal = ((parts >> 20) & 2047) - (120 << 3)
    code = tl.where(nearest < 0.015625, (nearest * 512.0).to(tl.int32), normal)
    code = tl.where(v == v, code, 127) | (bits >> 24) & 128
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@jit
def scaled(v, top):  # type: ignore[no-untyped-def]
    """v / (top / 448) in e4m3; top: the largest magnitude of each row, [BLOCK_M]."""
    return e4m3(v * tl.div_rn(448.0, top)[:, None])


@jit
def quantize(  # type: ignore[no-untyped-def]
    x,  # [M,N]
    out,  # [M,N] e4m3
    scale,  # [M]
    eps,
    smallest,  # lower bound of the largest magnitude of a row, for rows of zeros
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N
    NORMALIZE: tl.constexpr,
):
    """Grid: blocks of rows. The norm computes the mean first, then the squared deviations: nothing cancels."""
    await_inputs()
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    at = rows[:, None] * N + cols[None, :]
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if NORMALIZE:
        mean = tl.sum(v, 1)[:, None] / N
        deviation = tl.where(mask, v - mean, 0.0)
        variance = tl.sum(deviation * deviation, 1)[:, None] / N
        v = deviation * tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    top = tl.maximum(tl.max(tl.abs(v), 1), smallest)
    tl.store(out + at, scaled(v, top), mask=mask)
    tl.store(scale + rows, tl.div_rn(top, 448.0), mask=rows < M)
