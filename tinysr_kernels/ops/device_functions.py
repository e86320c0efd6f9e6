"""What kernels share: the product of two tiles, more K slices for a 1x1 shortcut, activations, a tile's epilogue."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl


@jit
def await_inputs():  # type: ignore[no-untyped-def]
    """First in every kernel, before it touches memory: wait until the launch before has ended, if this one began early.

    Everything before that one has ended then too, as it waited likewise. From here on the next launch may begin: once
    all programs of this one have come so far, its programs fill what is free and wait. Without programmatic dependent
    launch (`launch/plan.py`) there is nothing to wait for, and nothing begins early.
    """
    if tl.target_info.cuda_capability_geq(9):
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@await_inputs.interpreted
def _await_inputs():  # type: ignore[no-untyped-def]
    # The interpreter runs one launch after the other.
    pass


@jit
def product(a, b, acc):  # type: ignore[no-untyped-def]
    """acc + a @ b in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@product.interpreted
def _product(a, b, acc):  # type: ignore[no-untyped-def]
    # The interpreter holds bfloat16 as integers, and would multiply those.
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@jit
def rounded(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float32 tile in another dtype, rounded to the nearest, ties to even."""
    return v.to(dtype)


@rounded.interpreted
def _rounded(v, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    # The interpreter cuts float32 down to bfloat16; round before it does.
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
def add_product(  # type: ignore[no-untyped-def]
    acc,  # [PIXELS,OUTPUTS] float32
    a,  # [.., depth], the first pixel's row
    weight,  # [O, weight_depth], the column that belongs to a's first channel
    pixels,  # [PIXELS] which rows of a
    inside,  # [PIXELS] whether they exist
    outs,  # [OUTPUTS] which rows of weight
    outputs,  # O
    begin,  # the first of a's channels to take
    end,  # behind the last; whole slices are taken
    depth,  # channels of a
    weight_depth,  # elements from one row of weight to the next
    SLICE: tl.constexpr,  # channels a step
):
    """acc + a[pixels, begin:end] @ weight[outs, begin:end].T, in slices of K."""
    for start in range(begin, end, SLICE):
        k = start + tl.arange(0, SLICE)
        rows = tl.load(a + pixels[:, None] * depth + k[None, :], mask=inside[:, None] & (k[None, :] < depth), other=0.0)
        columns = tl.load(
            weight + outs[None, :] * weight_depth + k[:, None],
            mask=(outs[None, :] < outputs) & (k[:, None] < depth),
            other=0.0,
        )
        acc = product(rows.to(columns.dtype), columns, acc)
    return acc


@jit
def bias_row(bias, outs, outputs, OUTPUTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bias [1,OUTPUTS] in float32, zeros where there is none."""
    if bias is not None:
        beta = tl.load(bias + outs, mask=outs < outputs, other=0.0).to(tl.float32)
    else:
        beta = tl.full((OUTPUTS,), 0.0, tl.float32)
    return beta[None, :]


@jit
def finish(  # type: ignore[no-untyped-def]
    acc,  # [PIXELS,OUTPUTS] float32, the sums of a convolution
    beta,  # [1,OUTPUTS] float32, the bias
    residual,  # like out, or None
    out,
    base,  # int64, where the tile is in out
    at,  # [PIXELS,OUTPUTS] counted from there
    known,  # [PIXELS,OUTPUTS] what there is
    ACTIVATION: tl.constexpr,
    ACTIVATE_RESIDUAL: tl.constexpr,
):
    """Everything behind the sums, and the store of the tile, which is returned as stored."""
    v = acc + beta
    if residual is not None:
        other = tl.load(residual + base + at, mask=known, other=0.0).to(tl.float32)
        if ACTIVATE_RESIDUAL:
            v = activate(v + other, ACTIVATION)
        else:
            v = activate(v, ACTIVATION) + other
    else:
        v = activate(v, ACTIVATION)
    v = rounded(v, out.dtype.element_ty)
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
        u = rounded(v, dtype)
    return u
