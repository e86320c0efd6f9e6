"""GroupNorm and SiLU of an image's values as a convolution loads them, from the moments that their producer left."""

from __future__ import annotations

from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops.tiles import activate


@jit
def _tanh(v):  # type: ignore[no-untyped-def]
    """One special-function instruction, to a relative error of 2^-11: a rounding to half precision errs as much."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1)


@_tanh.interpreted
def _tanh_rounded(v):  # type: ignore[no-untyped-def]
    # The interpreter knows no machine code. Rounded to 11 digits, the tanh of this errs as much as the instruction's.
    exact = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * v))
    bits = exact.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -8192).to(tl.float32, bitcast=True)


@jit
def group_map(  # type: ignore[no-untyped-def]
    moments,  # [N,2,CHANNELS], mean and biased variance of every channel
    weight,  # [CHANNELS]
    bias,  # [CHANNELS]
    sample,  # int64
    chan,  # [STEP]
    eps,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,  # channels of a group
    MEMBERS: tl.constexpr,  # a power of two, at least WIDTH
):
    """center, gain and shift, each [1,STEP] float32, of the norm (v - center) * gain + shift; zeros behind the last."""
    there = chan < CHANNELS
    inner = tl.arange(0, MEMBERS)
    # All channels of the group that each channel belongs to; every channel has equally many pixels.
    member = (chan // WIDTH * WIDTH)[:, None] + inner[None, :]
    counts = there[:, None] & (inner < WIDTH)[None, :]
    at = moments + sample * 2 * CHANNELS + member
    mean = tl.load(at, mask=counts, other=0.0).to(tl.float32)
    variance = tl.load(at + CHANNELS, mask=counts, other=0.0).to(tl.float32)
    center = tl.sum(mean, 1) / WIDTH
    deviation = tl.where(counts, mean - center[:, None], 0.0)
    spread = tl.sum(variance + deviation * deviation, 1) / WIDTH
    gain = tl.load(weight + chan, mask=there, other=0.0).to(tl.float32) * tl.div_rn(1.0, tl.sqrt_rn(spread + eps))
    shift = tl.load(bias + chan, mask=there, other=0.0).to(tl.float32)
    return center[None, :], gain[None, :], shift[None, :]


@jit
def normed(v, inside, center, gain, shift, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu((v - center) * gain + shift) of a float32 tile, zero where it is not inside: padding comes after both.

    HALF: whether v has come from 16 bits. 0.5 y (1 + tanh(y / 2)) then takes one special function, where the
    quotient y / (1 + exp(-y)), which float32 needs, takes two.
    """
    y = (v - center) * gain + shift
    if HALF:
        y = 0.5 * y
        y += y * _tanh(y)
    else:
        y = activate(y, "silu")
    return tl.where(inside, y, 0.0)
