"""Arithmetic on what registers hold: arrays over warps and lanes.

A value is an int64 array with entries of 32 bits, 0 to 2^32-1, of a shape that broadcasts to [warps, 32]; a predicate
is such an array of bools; a 64-bit value is uint64. None stands for data that is unknown, such as what was loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Value = Array | None
MASK = 0xFFFFFFFF
LANES = 32


def constant(value: int) -> Array:
    """A value of 32 bits that is the same in all lanes."""
    return np.array([[value & MASK]], dtype=np.int64)


def truth(value: bool) -> Array:
    """A predicate that is the same in all lanes."""
    return np.array([[value]])


ZERO, TRUE, FALSE = constant(0), truth(True), truth(False)


def signed(a: Array) -> Array:
    """32 bits as a signed number."""
    return np.where(a >> 31 != 0, a - (1 << 32), a)


def wide(low: Array, high: Array | None = None) -> Array:
    """uint64 from one or two values of 32 bits."""
    both = low.astype(np.uint64)
    return both if high is None else both | high.astype(np.uint64) << np.uint64(32)


def low_word(a: Array) -> Array:
    """Bits 0 to 31 of a 64-bit value or of an int64 sum."""
    return (a.astype(np.uint64) & np.uint64(MASK)).astype(np.int64)


def high_word(a: Array) -> Array:
    """Bits 32 to 63 of a 64-bit value."""
    return (a.astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def floats(a: Array) -> Array:
    """32 bits as float32, in float64."""
    return np.ascontiguousarray(a).astype(np.uint32).view(np.float32).astype(np.float64)


def bits(a: Array) -> Array:
    """float64 rounded to float32, as 32 bits."""
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(a).astype(np.float32).view(np.uint32).astype(np.int64)


def by_table(a: Array, b: Array, c: Array, table: int, full: int) -> Array:
    """The bitwise function of three inputs whose result for bits (a, b, c) is bit 4a + 2b + c of the table.

    full: all bits of a value: 2^32-1, or 1 for predicates as 0 and 1.
    """
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), dtype=np.int64)
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else a ^ full) & (b if i & 2 else b ^ full) & (c if i & 1 else c ^ full)
    return result


def table_of_predicates(inputs: tuple[Value, Value, Value], table: int) -> Value:
    """`by_table` of three predicates; known where every value of the unknown inputs gives the same."""
    choices = [[FALSE, TRUE] if one is None else [one] for one in inputs]
    found = [
        by_table(x.astype(np.int64), y.astype(np.int64), z.astype(np.int64), table, 1) != 0
        for x in choices[0]
        for y in choices[1]
        for z in choices[2]
    ]
    return found[0] if all(_same(found[0], one) for one in found[1:]) else None


def both(a: Value, b: Value) -> Value:
    """a and b; False where one is False everywhere though the other is unknown."""
    if a is None or b is None:
        known = b if a is None else a
        return FALSE if known is not None and not known.any() else None
    return a & b


def either(a: Value, b: Value) -> Value:
    """a or b; True where one is True everywhere though the other is unknown."""
    if a is None or b is None:
        known = b if a is None else a
        return TRUE if known is not None and known.all() else None
    return a | b


def opposite(a: Value) -> Value:
    """Not a."""
    return None if a is None else ~a


def select(condition: Value, a: Value, b: Value) -> Value:
    """a where the condition holds, else b."""
    if condition is None:
        return a if a is not None and b is not None and _same(a, b) else None
    if condition.all():
        return a
    if not condition.any():
        return b
    return None if a is None or b is None else np.where(condition, a, b)


def _same(a: Array, b: Array) -> bool:
    return bool(np.all(a == b))


def add_with_carries(terms: list[Array]) -> tuple[Array, Array]:
    """The sum of values of up to 33 bits: its low 32 bits, and what is carried beyond them."""
    total = sum(terms[1:], start=terms[0])
    return total & MASK, total >> 32


def shift_pair(low: Array, high: Array, count: Array, left: bool, arithmetic: bool) -> Array:
    """(high:low) shifted, uint64; arithmetic: copies of the sign come in from the left. count: 0 to 63."""
    pair, by = wide(low, high), count.astype(np.uint64)
    if left:
        return np.left_shift(pair, by)
    if arithmetic:
        return np.right_shift(pair.view(np.int64), by.astype(np.int64)).view(np.uint64)
    return np.right_shift(pair, by)


def permute_bytes(a: Array, b: Array, selector: int) -> Array:
    """Byte i of the result is the one of (b:a) that digit i of the selector names; its bit 3: that byte's sign."""
    result = np.zeros(np.broadcast_shapes(a.shape, b.shape), dtype=np.int64)
    for i in range(4):
        digit = selector >> 4 * i & 15
        source = a if digit & 4 == 0 else b
        byte = source >> 8 * (digit & 3) & 0xFF
        result |= (0xFF * (byte >> 7) if digit & 8 else byte) << 8 * i
    return result


COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}
