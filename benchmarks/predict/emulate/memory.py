"""Memory instructions: their addresses; what they load is unknown."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.predict.emulate.disassembly import Instruction, Operand, UnknownCode
from benchmarks.predict.emulate.state import Access, Warps
from benchmarks.predict.emulate.values import TRUE, Array, Value, both

WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def width_of(i: Instruction) -> int:
    """Bytes per lane."""
    return next((WIDTHS[name] for name in i.modifiers if name in WIDTHS), 4)


def _access(
    w: Warps, i: Instruction, guard: Value, at: Operand, width: int, kind: str = "", bypass: bool = False
) -> Access:
    """guard: an unknown one counts as executed."""
    found = w.address(at)
    address: Array | None = None if found is None else w.lanes(found)
    active = w.lanes(TRUE if guard is None else guard)
    return Access(kind or i.base, width, w.numbers, address, active, bypass)


def load(w: Warps, i: Instruction, guard: Value) -> Access:
    """LDG d, [address] [, p]; LDS d, [address]; LDL likewise. p: a second guard."""
    d, at, *more = i.operands
    width = width_of(i)
    for o in more:
        if o.is_predicate:
            guard = both(guard, w.predicate(o))
    access = _access(w, i, guard, at, width)  # first: the address may lie in the same registers
    w.write_unknown(d, max(width // 4, 1), guard)
    return access


def store(w: Warps, i: Instruction, guard: Value) -> Access:
    """STG [address], a; STS and STL likewise."""
    return _access(w, i, guard, i.operands[0], width_of(i))


def load_matrices(w: Warps, i: Instruction, guard: Value) -> Access:
    """LDSM.n d, [address]: n matrices of eight rows of 16 bytes; lane 8m + r has the address of row r of matrix m."""
    count = int(i.modifiers[-1]) if i.modifiers[-1].isdigit() else 1
    access = _access(w, i, guard, i.operands[1], count)
    w.write_unknown(i.operands[0], count, guard)
    return access


def store_matrices(w: Warps, i: Instruction, guard: Value) -> Access:
    """STSM.n [address], a."""
    count = int(i.modifiers[-1]) if i.modifiers[-1].isdigit() else 1
    return _access(w, i, guard, i.operands[0], count)


def copy_async(w: Warps, i: Instruction, guard: Value) -> Access:
    """LDGSTS [shared], [global] [, p]: from global to shared memory; BYPASS: past the L1."""
    _, source, *more = i.operands
    for o in more:
        if o.is_predicate:
            guard = both(guard, w.predicate(o))
    return _access(w, i, guard, source, width_of(i), bypass="BYPASS" in i.flags)


def mma(w: Warps, i: Instruction, guard: Value) -> None:
    """HMMA, QMMA, HGMMA, QGMMA d, ..: the accumulators are unknown data."""
    if i.base in ("HMMA", "QMMA"):
        w.write_unknown(i.operands[0], 4 if "F32" in i.flags else 2, guard)
    else:
        columns = int(i.modifiers[0].split("x")[1])
        w.write_unknown(i.operands[0], columns // 2, guard)


Handler = Callable[[Warps, Instruction, Value], Access | None]


def unknown(registers: int) -> Handler:
    """A handler for data: this many registers, or the predicates among the first two operands, become unknown."""

    def forget(w: Warps, i: Instruction, guard: Value) -> None:
        d = i.operands[0]
        if d.is_predicate:
            for o in i.operands[:2]:
                if o.is_predicate:
                    w.write_predicate(o, None, guard)
                elif o.file == "R":
                    w.write_unknown(o, registers, guard)
        elif d.file in ("R", "UR"):
            w.write_unknown(d, registers, guard)
        else:
            raise UnknownCode(i.text)

    return forget


def nothing(w: Warps, i: Instruction, guard: Value) -> None:
    """An instruction without a result: barriers, waits, hints."""
