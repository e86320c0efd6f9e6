"""The registers and predicates of warps that run the same instructions, read and written through operands."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from benchmarks.predict.emulate.disassembly import Operand, UnknownCode
from benchmarks.predict.emulate.values import LANES, MASK, TRUE, ZERO, Array, Value, both, constant, wide

SCALE = {"X4": 4, "X8": 8, "X16": 16}
POISON = constant(0x5A5A5A5A)
"""What lanes hold that kept unknown data while others of their warp got a known value: as an address it lies outside
every tensor, so that an access with it is an error."""
BYTES = {"B0": 0, "B1": 8, "B2": 16, "B3": 24}


@dataclass(frozen=True)
class Access:
    """One memory instruction of several warps.

    kind: the instruction, such as "LDG". width: bytes per lane (matrices for LDSM and STSM). warps: their numbers,
    [n]. address: bytes, [n, 32], None if unknown. active: [n, 32]. bypass: whether it goes past the L1.
    """

    kind: str
    width: int
    warps: Array
    address: Array | None
    active: Array
    bypass: bool = False


Step = tuple[int, Access | None, bool]
"""The index of an instruction, its memory access if it makes one, and whether any lane executed it."""


@dataclass
class Warps:
    """The state of warps at the same instruction.

    numbers: of the warps within their program, [n]. constants: bank 0 in words by byte offset. special: special
    registers by name. alive: the lanes that have not left, None for all. sleeping: lanes that have jumped ahead of the
    others of their warp, and where to.
    """

    numbers: Array
    constants: Mapping[int, int]
    special: dict[str, Array]
    files: dict[str, dict[int, Value]] = field(default_factory=lambda: {"R": {}, "UR": {}, "P": {}, "UP": {}})
    alive: Array | None = None
    sleeping: list[tuple[int, Array]] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    trace: list[Step] = field(default_factory=list)
    at: int = 0

    def part(self, chosen: Array) -> Warps:
        """A copy of some of the warps; chosen: [n] bools."""

        def cut(value: Value) -> Value:
            return value if value is None or len(value) == 1 else value[chosen]

        made = copy.copy(self)
        made.numbers = self.numbers[chosen]
        made.special = {name: value if len(value) == 1 else value[chosen] for name, value in self.special.items()}
        made.files = {name: {k: cut(v) for k, v in file.items()} for name, file in self.files.items()}
        made.alive = cut(self.alive)
        made.sleeping = [(at, lanes[chosen]) for at, lanes in self.sleeping]
        made.calls, made.trace = list(self.calls), list(self.trace)
        return made

    def lanes(self, value: Array) -> Array:
        """The value for every warp and lane, [n, 32]."""
        return np.broadcast_to(value, (len(self.numbers), LANES))

    # Reading

    def read(self, o: Operand) -> Value:
        """The 32 bits of an operand."""
        value = self.raw(o)
        if value is None or not (o.part or o.inverted or o.negated or o.absolute):
            return value
        if o.part in BYTES:
            value = value >> BYTES[o.part] & 0xFF
        elif o.part == "H0_H0":
            value = value & 0xFFFF
        elif o.part == "H1_H1":
            value = value >> 16 & 0xFFFF
        if o.inverted:
            value = value ^ MASK
        return -value & MASK if o.negated else value

    def raw(self, o: Operand) -> Value:
        """The 32 bits without the operand's sign and part."""
        if o.file in ("R", "UR"):
            return ZERO if o.index < 0 else self.files[o.file].get(o.index)
        if o.file == "number":
            return constant(o.index)
        if o.file == "constant":
            found = self.constants.get(o.index)
            return None if found is None else constant(found)
        raise UnknownCode(f"operand {o.text}")

    def addend(self, o: Operand) -> Value:
        """An operand of an addition whose carry counts: -x is ~x + 1, which carries for 0."""
        if o.negated and o.file != "number":
            value = self.raw(o)
            return None if value is None else (value ^ MASK) + 1
        return self.read(o)

    def read64(self, o: Operand) -> Value:
        """The 64 bits of a register pair, of two constants, or of a number, uint64."""
        if o.file == "number" or o.index < 0:
            value = self.read(o)
            return None if value is None else wide(value)
        second = Operand(o.file, o.index + (4 if o.file == "constant" else 1), o.text)
        low, high = self.raw(Operand(o.file, o.index, o.text)), self.raw(second)
        if low is None or high is None:
            return None
        return -wide(low, high) if o.negated else wide(low, high)

    def predicate(self, o: Operand) -> Value:
        """A predicate operand."""
        if not o.is_predicate:
            raise UnknownCode(f"{o.text} is no predicate")
        value = TRUE if o.index < 0 else self.files[o.file].get(o.index)
        return ~value if value is not None and o.negated else value

    def guard(self, o: Operand | None) -> Value:
        """The lanes that execute an instruction with this guard."""
        value = TRUE if o is None else self.predicate(o)
        return value if self.alive is None else both(value, self.alive)

    def address(self, o: Operand) -> Value:
        """The address of a memory operand in bytes, uint64."""
        total = wide(ZERO)
        for term in o.terms:
            if term.part == "64":
                value = self.read64(term)
            else:
                value = self.read(term)
                if value is not None:
                    offset = value - (1 << 32) if term.file == "number" and term.text.startswith("-") else value
                    value = (offset * SCALE.get(term.part, 1)).astype(np.uint64)
            if value is None:
                return None
            total = total + value
        return total

    # Writing

    def write(self, o: Operand, value: Value, guard: Value = TRUE) -> None:
        """32 bits into a register; a uniform register takes those of lane 0."""
        if o.index < 0:
            return
        if o.file not in ("R", "UR"):
            raise UnknownCode(f"writes {o.text}")
        if value is not None and o.file == "UR":
            value = value[:, :1]
        self._merge(o.file, o.index, value, guard)

    def write64(self, o: Operand, value: Value, guard: Value = TRUE) -> None:
        """64 bits (uint64) into a register pair."""
        if o.index < 0:
            return
        low = high = None
        if value is not None:
            low, high = (value & np.uint64(MASK)).astype(np.int64), (value >> np.uint64(32)).astype(np.int64)
        self.write(o, low, guard)
        self.write(Operand(o.file, o.index + 1, o.text), high, guard)

    def write_unknown(self, o: Operand, count: int, guard: Value = TRUE) -> None:
        """Unknown data into this many registers."""
        for i in range(count if o.index >= 0 else 0):
            self._merge(o.file, o.index + i, None, guard)

    def write_predicate(self, o: Operand, value: Value, guard: Value = TRUE) -> None:
        """A predicate; a uniform one takes that of lane 0."""
        if o.index >= 0:
            self._merge(o.file, o.index, value[:, :1] if value is not None and o.file == "UP" else value, guard)

    def _merge(self, file: str, index: int, value: Value, guard: Value) -> None:
        registers = self.files[file]
        if guard is TRUE or (guard is not None and guard.all()):
            registers[index] = value
        elif guard is None:
            registers[index] = None
        elif guard.any():
            old = registers.get(index)
            if file in ("UR", "UP"):
                guard = guard[:, :1]
            if old is None and file in ("R", "UR"):
                old = POISON
            registers[index] = None if value is None or old is None else np.where(guard, value, old)


def executes(guard: Value) -> bool:
    """Whether any lane may execute."""
    return guard is None or bool(guard.any())
