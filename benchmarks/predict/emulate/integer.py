"""Integer, predicate and conversion instructions: what addresses, trip counts and predicates are computed with.

Each function executes one instruction on the warps' state: (warps, instruction, guard). Operand order is that of
nvdisasm's listing; the meaning follows the names in NVIDIA's "CUDA binary utilities", and where these say nothing,
what the compiler's code needs to be right: 64-bit addresses, divisions and bounds come out as in the kernel's source.
"""

from __future__ import annotations

import numpy as np

from benchmarks.predict.emulate.disassembly import Instruction, Operand, UnknownCode
from benchmarks.predict.emulate.state import Warps
from benchmarks.predict.emulate.values import (
    COMPARE,
    MASK,
    ZERO,
    Array,
    Value,
    add_with_carries,
    both,
    by_table,
    either,
    high_word,
    low_word,
    opposite,
    permute_bytes,
    select,
    shift_pair,
    signed,
    table_of_predicates,
    wide,
)


def move(w: Warps, i: Instruction, guard: Value) -> None:
    """MOV d, a."""
    w.write(i.operands[0], w.read(i.operands[1]), guard)


def load_constant(w: Warps, i: Instruction, guard: Value) -> None:
    """LDC d, c[..]; of 64 bits: a pair."""
    d, a = i.operands
    if i.flags - {"U32", "S32", "64"}:
        raise UnknownCode(i.text)
    for word in range(2 if "64" in i.flags else 1):
        place = Operand(d.file, d.index + word, d.text)
        w.write(place, w.read(Operand(a.file, a.index + 4 * word, a.text)) if a.index >= 0 else None, guard)


def special_register(w: Warps, i: Instruction, guard: Value) -> None:
    """S2R d, SR_x; CS2R d, SRZ (a pair unless 32)."""
    d, source = i.operands
    value = ZERO if source.text == "SRZ" else w.special.get(source.text)
    if i.base == "CS2R" and "32" not in i.flags:
        w.write64(d, None if value is None else wide(value), guard)
    else:
        w.write(d, value, guard)


def parts(operands: tuple[Operand, ...]) -> tuple[list[Operand], list[Operand], list[Operand]]:
    """Predicates written before the sources, the sources, predicates read after them."""
    first = next((n for n, o in enumerate(operands) if not o.is_predicate), len(operands))
    sources = [o for o in operands[first:] if not o.is_predicate]
    return list(operands[:first]), sources, [o for o in operands[first:] if o.is_predicate]


def _carry(w: Warps, o: Operand) -> Value:
    value = w.predicate(o)
    return None if value is None else value.astype(np.int64)


def add3(w: Warps, i: Instruction, guard: Value) -> None:
    """IADD3 d, [p, [q,]] a, b, c [, carry in]: p and q are the carries."""
    d = i.operands[0]
    carries, sources, given = parts(i.operands[1:])
    terms = [w.addend(o) for o in sources] + [_carry(w, o) for o in given if "X" in i.flags]
    known = [one for one in terms if one is not None]
    total, carried = add_with_carries(known) if len(known) == len(terms) else (None, None)
    w.write(d, total, guard)
    for n, o in enumerate(carries):
        w.write_predicate(o, None if carried is None else carried > n, guard)


def add(w: Warps, i: Instruction, guard: Value) -> None:
    """VIADD d, a, b; 16x2: of halves, which serves data alone."""
    if "16x2" in i.flags:
        w.write(i.operands[0], None, guard)
        return
    if i.flags - {"U32"}:
        raise UnknownCode(i.text)
    found = [w.read(o) for o in i.operands[1:]]
    known = [one for one in found if one is not None]
    w.write(i.operands[0], add_with_carries(known)[0] if len(known) == len(found) else None, guard)


def multiply_add(w: Warps, i: Instruction, guard: Value) -> None:
    """IMAD d, a, b, c: the low 32 bits of a * b + c; WIDE: all 64 bits, with a 64-bit c; HI: the upper 32 of these."""
    if i.flags & {"WIDE", "HI"}:
        _multiply_add_wide(w, i, guard)
        return
    _, sources, given = parts(i.operands[1:])
    a, b, c = (w.read(o) for o in sources)
    if a is None and _is_zero(b):
        a = ZERO
    if b is None and _is_zero(a):
        b = ZERO
    if a is None or b is None or c is None:
        w.write(i.operands[0], None, guard)
        return
    product = low_word(a.astype(np.uint64) * b.astype(np.uint64)) + c
    if "X" in i.flags and given:
        carry = _carry(w, given[-1])
        w.write(i.operands[0], None if carry is None else product + carry & MASK, guard)
    else:
        w.write(i.operands[0], product & MASK, guard)


def _is_zero(a: Value) -> bool:
    return a is not None and not a.any()


def _multiply_add_wide(w: Warps, i: Instruction, guard: Value) -> None:
    carries, sources, given = parts(i.operands[1:])
    a, b, c = w.read(sources[0]), w.read(sources[1]), w.read64(sources[2])
    carry = _carry(w, given[-1]) if "X" in i.flags and given else ZERO
    total = carried = None
    if a is not None and b is not None and c is not None and carry is not None:
        if "U32" in i.flags:
            product = a.astype(np.uint64) * b.astype(np.uint64)
        else:
            product = (signed(a) * signed(b)).astype(np.uint64)
        partial = product + c
        total = partial + carry.astype(np.uint64)
        carried = (partial < product) | (total < partial)
    for o in carries:
        w.write_predicate(o, carried, guard)
    if "WIDE" in i.flags:
        w.write64(i.operands[0], total, guard)
    else:
        w.write(i.operands[0], None if total is None else high_word(total), guard)


def shift_add(w: Warps, i: Instruction, guard: Value) -> None:
    """LEA d, [p,] a, b, n: (a << n) + b, p its carry; HI: of ((c:a) << n) the upper word, with a, b, c, n."""
    d = i.operands[0]
    carries, sources, given = parts(i.operands[1:])
    *places, count_at = sources
    found = [w.read(o) for o in places]
    count = w.read(count_at)
    carry = _carry(w, given[-1]) if "X" in i.flags and given else ZERO
    if count is None or carry is None or any(one is None for one in found):
        w.write(d, None, guard)
        for o in carries:
            w.write_predicate(o, None, guard)
        return
    a, b = found[0], w.addend(places[1])
    assert a is not None
    assert b is not None
    if "HI" in i.flags:
        above = found[2] if len(found) > 2 else ZERO
        if "SX32" in i.flags:
            above = np.where(a >> 31 != 0, MASK, 0)
        assert above is not None
        shifted = high_word(shift_pair(a, above, count, left=True, arithmetic=False))
    else:
        shifted = a << count & MASK
    total, carried = add_with_carries([shifted, b, carry])
    w.write(d, total, guard)
    for o in carries:
        w.write_predicate(o, carried > 0, guard)


def shift(w: Warps, i: Instruction, guard: Value) -> None:
    """SHF d, low, n, high: the pair (high:low) shifted to L or R; the result is its low word, with HI its upper one."""
    low, count, high = (w.read(o) for o in i.operands[1:4])
    if low is None or count is None or high is None:
        w.write(i.operands[0], None, guard)
        return
    double = bool(i.flags & {"U64", "S64"})
    count = count & 31 if "W" in i.flags else np.minimum(count, 63 if double else 32)
    moved = shift_pair(low, high, count, left="L" in i.flags, arithmetic=bool(i.flags & {"S32", "S64"}))
    w.write(i.operands[0], high_word(moved) if "HI" in i.flags else low_word(moved), guard)


def logic3(w: Warps, i: Instruction, guard: Value) -> None:
    """LOP3 [p,] d, a, b, c, table: bit by bit; p: whether the result has a bit set."""
    written, sources, _ = parts(i.operands)
    a, b, c = (w.read(o) for o in sources[1:4])
    table = sources[4].index
    if table == 0xC0 and (_is_zero(a) or _is_zero(b)):
        a = b = c = ZERO
    result = None if a is None or b is None or c is None else by_table(a, b, c, table, MASK)
    w.write(sources[0], result, guard)
    for o in written:
        w.write_predicate(o, None if result is None else result != 0, guard)


def logic_of_predicates(w: Warps, i: Instruction, guard: Value) -> None:
    """PLOP3 p, q, a, b, c, table of p, table of q."""
    p, q, a, b, c, of_p, of_q = i.operands
    inputs = (w.predicate(a), w.predicate(b), w.predicate(c))
    for o, table in ((p, of_p), (q, of_q)):
        w.write_predicate(o, table_of_predicates(inputs, table.index), guard)


def compare(w: Warps, i: Instruction, guard: Value) -> None:
    """ISETP.cc.AND p, q, a, b, r [, e]: p = (a cc b) and r, q = not (a cc b) and r; EX: e compares the lower words."""
    p, q, a_at, b_at, with_at, *lower_at = i.operands
    a, b, other = w.read(a_at), w.read(b_at), w.predicate(with_at)
    result: Value = None
    if a is not None and b is not None:
        if "U32" not in i.flags:
            a, b = signed(a), signed(b)
        if "EX" in i.flags:
            result = _extended(i, a, b, w.predicate(lower_at[0]))
        else:
            result = COMPARE[i.modifiers[0]](a, b)
    w.write_predicate(p, _combine(i, result, other), guard)
    w.write_predicate(q, _combine(i, opposite(result), other), guard)


def _extended(i: Instruction, a: Array, b: Array, lower: Value) -> Value:
    """The comparison of 64 bits: by the upper words (a, b), where these are equal by the lower."""
    relation = i.modifiers[0]
    if relation == "EQ":
        return both(a == b, lower)
    if relation == "NE":
        return either(a != b, lower)
    strictly = {"GE": "GT", "LE": "LT"}.get(relation, relation)
    return either(COMPARE[strictly](a, b), both(a == b, lower))


def _combine(i: Instruction, a: Value, b: Value) -> Value:
    if "OR" in i.flags:
        return either(a, b)
    if "XOR" in i.flags:
        return None if a is None or b is None else a ^ b
    return both(a, b)


def choose(w: Warps, i: Instruction, guard: Value) -> None:
    """SEL d, a, b, p: p ? a : b."""
    d, a, b, p = i.operands
    w.write(d, select(w.predicate(p), w.read(a), w.read(b)), guard)


def least_or_most(w: Warps, i: Instruction, guard: Value) -> None:
    """VIMNMX d, a, b, p: the smaller where p holds, else the larger; VIADDMNMX d, a, b, c, p: of a + b and c."""
    *sources, p = i.operands[1:]
    found = [w.read(o) for o in sources]
    smaller = w.predicate(p)
    known = [one for one in found if one is not None]
    if len(known) < len(found) or smaller is None or i.flags - {"U32"}:
        w.write(i.operands[0], None, guard)
        return
    if i.base == "VIADDMNMX":
        known = [known[0] + known[1] & MASK, known[2]]
    a, b = known if "U32" in i.flags else map(signed, known)
    w.write(i.operands[0], np.where(smaller, np.minimum(a, b), np.maximum(a, b)) & MASK, guard)


def permute(w: Warps, i: Instruction, guard: Value) -> None:
    """PRMT d, a, selector, b: four bytes of (b:a)."""
    a, chosen, b = (w.read(o) for o in i.operands[1:4])
    if chosen is None or chosen.size > 1 or i.flags:
        w.write(i.operands[0], None, guard)
        return
    selector = int(chosen.item())
    uses_b = [bool(selector >> 4 * n & 4) for n in range(4)]
    if (a is None and not all(uses_b)) or (b is None and any(uses_b)):
        w.write(i.operands[0], None, guard)
        return
    w.write(i.operands[0], permute_bytes(ZERO if a is None else a, ZERO if b is None else b, selector), guard)


def extend_sign(w: Warps, i: Instruction, guard: Value) -> None:
    """SGXT d, a, n: the lower n bits of a with their sign; U32: without."""
    a, n = w.read(i.operands[1]), w.read(i.operands[2])
    if a is None or n is None or n.size > 1:
        w.write(i.operands[0], None, guard)
        return
    count = int(n.item())
    value = a & (1 << count) - 1
    if "U32" not in i.flags and count:
        value = np.where(value >> count - 1 & 1 != 0, value - (1 << count), value) & MASK
    w.write(i.operands[0], value, guard)


def absolute(w: Warps, i: Instruction, guard: Value) -> None:
    """IABS d, a."""
    a = w.read(i.operands[1])
    w.write(i.operands[0], None if a is None else np.abs(signed(a)) & MASK, guard)
