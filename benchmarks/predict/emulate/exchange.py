"""Conversions, float32 arithmetic on known values, and instructions that exchange values between lanes or registers.

As in integer.py, each function executes one instruction: (warps, instruction, guard).
"""

from __future__ import annotations

import numpy as np

from benchmarks.predict.emulate.disassembly import Instruction, Operand
from benchmarks.predict.emulate.integer import parts
from benchmarks.predict.emulate.state import Warps
from benchmarks.predict.emulate.values import FALSE, MASK, TRUE, Array, Value, bits, both, constant, floats, signed


def to_float(w: Warps, i: Instruction, guard: Value) -> None:
    """I2F d, a: to float32, rounded to nearest; RP: upward."""
    double = bool(i.flags & {"U64", "S64"})
    a = w.read64(i.operands[1]) if double else w.read(i.operands[1])
    if a is None or i.flags & {"F16", "F64", "BF16"}:
        w.write_unknown(i.operands[0], 2 if "F64" in i.flags else 1, guard)
        return
    if "S64" in i.flags:
        a = a.view(np.int64)
    elif not i.flags & {"U32", "U16", "U8", "U64"}:
        a = signed(a)
    elif "U16" in i.flags:
        a = a & 0xFFFF
    exact = a.astype(np.float64)
    rounded = exact.astype(np.float32)
    if "RP" in i.flags:
        rounded = np.where(rounded.astype(np.float64) < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
    w.write(i.operands[0], bits(rounded), guard)


def to_integer(w: Warps, i: Instruction, guard: Value) -> None:
    """F2I d, a: by TRUNC, FLOOR or CEIL, otherwise to nearest; what does not fit becomes the nearest that does."""
    a = w.raw(i.operands[1])
    double = bool(i.flags & {"U64", "S64"})
    if a is None or i.flags & {"F16", "F64"}:
        w.write_unknown(i.operands[0], 2 if double else 1, guard)
        return
    value = _sign(i.operands[1], floats(a))
    with np.errstate(all="ignore"):
        rounding = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}
        value = next((rounding[name] for name in rounding if name in i.flags), np.rint)(value)
        least, most = (0.0, 2.0**32 - 1) if i.flags & {"U32", "U16", "U8"} else (-(2.0**31), 2.0**31 - 1)
        if double:
            least, most = (0.0, 2.0**63) if "U64" in i.flags else (-(2.0**62), 2.0**62)
        value = np.clip(np.nan_to_num(value, nan=0.0), least, most)
    if double:
        w.write64(i.operands[0], value.astype(np.uint64 if "U64" in i.flags else np.int64).astype(np.uint64), guard)
    else:
        w.write(i.operands[0], value.astype(np.int64) & MASK, guard)


def _sign(o: Operand, value: Array) -> Array:
    value = np.abs(value) if o.absolute else value
    return -value if o.negated else value


def reciprocal(w: Warps, i: Instruction, guard: Value) -> None:
    """MUFU.RCP d, a, within integer divisions; other functions serve data alone."""
    a = w.raw(i.operands[1]) if i.modifiers[:1] == ("RCP",) else None
    with np.errstate(all="ignore"):
        w.write(i.operands[0], None if a is None else bits(1.0 / _sign(i.operands[1], floats(a))), guard)


def float_multiply_add(w: Warps, i: Instruction, guard: Value) -> None:
    """FADD, FMUL, FFMA where the inputs are known: coordinates that are computed in float32."""
    sources = [o for o in i.operands[1:] if not o.is_predicate]
    found = [w.raw(o) for o in sources]
    known = [_sign(o, floats(one)) for o, one in zip(sources, found, strict=True) if one is not None]
    if len(known) < len(found):
        w.write(i.operands[0], None, guard)
        return
    with np.errstate(all="ignore"):
        result = known[0] + known[1] if i.base == "FADD" else known[0] * known[1]
        if i.base == "FFMA":
            result = result + known[2]
    w.write(i.operands[0], bits(result), guard)


def to_uniform(w: Warps, i: Instruction, guard: Value) -> None:
    """R2UR d, a: lane 0 of a."""
    _, (d, a), _ = parts(i.operands)
    value = w.read(a)
    w.write(d, None if value is None else value[:, :1], TRUE if guard is None or guard.any() else FALSE)


def vote(w: Warps, i: Instruction, guard: Value) -> None:
    """VOTE.ANY/ALL [d,] p, a: over the lanes of a warp; d: their ballot."""
    *written, source = i.operands
    a = w.predicate(source)
    a = a if a is None or w.alive is None else both(a, w.alive)
    for o in written:
        if o.is_predicate:
            over = np.any if "ANY" in i.flags else np.all
            w.write_predicate(o, None if a is None else np.asarray(over(a, axis=1, keepdims=True)), guard)
        else:
            ballot = None if a is None else (w.lanes(a) << np.arange(32)).sum(1, keepdims=True)
            w.write(o, ballot, guard)


def shuffle(w: Warps, i: Instruction, guard: Value) -> None:
    """SHFL.mode [p,] d, a, b, c: a of another lane."""
    written, (d, a_at, b_at, *_), _ = parts(i.operands)
    for o in written:
        w.write_predicate(o, TRUE, guard)
    a, b = w.read(a_at), w.read(b_at)
    if a is None or b is None:
        w.write(d, None, guard)
        return
    lane = np.arange(32)[None]
    sources = {"BFLY": lane ^ b, "IDX": b & 31, "UP": np.maximum(lane - b, 0), "DOWN": np.minimum(lane + b, 31)}
    w.write(d, np.take_along_axis(w.lanes(a), w.lanes(sources[i.modifiers[0]]), axis=1), guard)


def predicates_to_register(w: Warps, i: Instruction, guard: Value) -> None:
    """P2R d, PR, a, mask: bit k of the mask is replaced by predicate k."""
    d, _, base_at, mask = i.operands
    base = w.read(base_at)
    chosen = [k for k in range(7) if mask.index >> k & 1]
    found = [w.files["P"].get(k) for k in chosen]
    result = None if base is None or d.part else base & (mask.index ^ MASK)
    for k, value in zip(chosen, found, strict=True):
        result = None if value is None or result is None else result | value.astype(np.int64) << k
    w.write(Operand(d.file, d.index, d.text), result, guard)


def register_to_predicates(w: Warps, i: Instruction, guard: Value) -> None:
    """R2P PR, a, mask: predicate k becomes bit k of a, for each k of the mask."""
    a, mask = w.read(i.operands[1]), i.operands[2].index
    for k in range(7):
        if mask >> k & 1:
            value = None if a is None or i.operands[1].part else a >> k & 1 != 0
            w.write_predicate(Operand("P", k, f"P{k}"), value, guard)


def half_constant(w: Warps, i: Instruction, guard: Value) -> None:
    """HFMA2 d, -RZ, RZ, x, y is how two halves, or any 32 bits, are made; other half arithmetic serves data alone."""
    d, *sources = i.operands
    zeros = len(sources) == 4 and all(o.index < 0 for o in sources[:2])
    if i.base == "HFMA2" and zeros and all(o.file == "number" for o in sources[2:]):
        w.write(d, constant(_half(sources[2]) << 16 | _half(sources[3])), guard)
        return
    w.write_unknown(d, 1, guard)


def _half(o: Operand) -> int:
    """The 16 bits of a number as float16."""
    value = np.nan if "NAN" in o.text else float(o.text.replace("INF", "inf"))
    return int(np.float16(value).view(np.uint16))
