"""Device functions that kernels share: dot products of tiles, activations, the epilogue, rounding, and the PDL wait."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl


@jit
def await_inputs():  # type: ignore[no-untyped-def]
    """First in every kernel, before any memory access: wait until the previous launch has completed.

    All launches before that one are complete then too, since it waited likewise. From here on the next launch may
    start: once every program of this launch has come so far, its programs take free resources and wait. Without
    programmatic dependent launch (`launch/plan.py`) this does nothing.
    """
    if tl.target_info.cuda_capability_geq(9):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@await_inputs.interpreted
def _await_inputs():  # type: ignore[no-untyped-def]
    # The interpreter runs launches one after the other.
    pass


@jit
def tile_dot(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a @ b in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@tile_dot.interpreted
def _tile_dot(a, b, acc):  # type: ignore[no-untyped-def]
    # The interpreter stores bfloat16 as integers and would multiply those.
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@jit
def round_to(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float32 tile in another dtype, rounded to the nearest, ties to even."""
    return v.to(dtype)


@round_to.interpreted
def _round_to(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    # The interpreter truncates float32 to bfloat16; round first.
    if dtype == tl.bfloat16:
        bits = v.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        v = tl.where(v == v, bits.to(tl.float32, bitcast=True), v)
    return v.to(dtype)


@jit
def activate(v, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """none, relu or silu of a float32 tile."""
    if ACTIVATION == "relu":
        # Not tl.maximum, which turns NaN into 0 and would hide an overflow.
        v = tl.where(v < 0, 0.0, v)
    elif ACTIVATION == "silu":
        v = v / (1.0 + tl.exp(-v))
    return v


@jit
def gelu_tanh(v):  # type: ignore[no-untyped-def]
    """0.5 v (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3))), by way of 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u))."""
    return v / (1.0 + tl.exp(v * (-1.5957691216057308 - 0.07135481282971408 * v * v)))


@jit
def accumulate_matmul(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M,BLOCK_N] float32
    a,  # [.., depth], the first pixel's row
    weight,  # [O, weight_depth], the column that belongs to a's first channel
    pixels,  # [BLOCK_M], rows of a
    inside,  # [BLOCK_M], their mask
    outs,  # [BLOCK_N], rows of weight
    outputs,  # O
    begin,  # the first of a's channels to take
    end,  # one past the last; whole blocks are taken
    depth,  # channels of a
    weight_depth,  # elements from one row of weight to the next
    BLOCK_K: tl.constexpr,  # channels per step
):
    """acc + a[pixels, begin:end] @ weight[outs, begin:end].T, in steps of BLOCK_K."""
    for start in range(begin, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = tl.load(a + pixels[:, None] * depth + k[None, :], mask=inside[:, None] & (k[None, :] < depth), other=0.0)
        columns = tl.load(
            weight + outs[None, :] * weight_depth + k[:, None],
            mask=(outs[None, :] < outputs) & (k[:, None] < depth),
            other=0.0,
        )
        acc = tile_dot(rows.to(columns.dtype), columns, acc)
    return acc


@jit
def bias_row(bias, outs, outputs, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bias [1,BLOCK_N] in float32, zeros if there is none."""
    if bias is not None:
        beta = tl.load(bias + outs, mask=outs < outputs, other=0.0).to(tl.float32)
    else:
        beta = tl.full((BLOCK_N,), 0.0, tl.float32)
    return beta[None, :]


@jit
def epilogue(  # type: ignore[no-untyped-def]
    acc,  # [BLOCK_M,BLOCK_N] float32, a convolution's accumulators
    beta,  # [1,BLOCK_N] float32, the bias
    residual,  # like out, or None
    out,
    base,  # int64, where the tile is in out
    at,  # [BLOCK_M,BLOCK_N] counted from there
    known,  # [BLOCK_M,BLOCK_N], the mask
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
):
    """Bias, residual and activation of a convolution's accumulators; stores the tile and returns it as stored."""
    v = acc + beta
    if residual is not None:
        other = tl.load(residual + base + at, mask=known, other=0.0).to(tl.float32)
        if ACTIVATE_RESIDUAL:
            v = activate(v + other, ACTIVATION)
        else:
            v = activate(v, ACTIVATION) + other
    else:
        v = activate(v, ACTIVATION)
    v = round_to(v, out.dtype.element_ty)
    tl.store(out + base + at, v, mask=known)
    return v


@jit
def unit_range(v):  # type: ignore[no-untyped-def]
    """v clamped to [0,1]; NaN stays."""
    v = tl.where(v < 0, 0.0, v)
    return tl.where(v > 1, 1.0, v)


@jit
def image_value(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float32 tile in [0,1] as an image of the dtype holds it; uint8 holds 255 v, rounded as `rounded` does."""
    if dtype == tl.uint8:
        # Adding 1.5 * 2^23 leaves no digit behind the point.
        u = (v * 255.0 + 12582912.0 - 12582912.0).to(dtype)
    else:
        u = round_to(v, dtype)
    return u
