"""One middle program of a launch, executed: its arguments placed in memory, its accesses checked against its tensors.

Kernel parameters lie in constant bank 0 from an offset that depends on the architecture, each aligned to its size;
compile-time constants are not passed; Triton appends pointers to global and profiling scratch memory. Offsets and
the words before them: as the compiler's code reads them (sm_80 to sm_89, and sm_90).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.predict.cubins import Cubin, cubin
from benchmarks.predict.emulate.disassembly import Instruction, UnknownCode, parse
from benchmarks.predict.emulate.emulator import run
from benchmarks.predict.emulate.state import Access, Step
from benchmarks.predict.emulate.values import LANES, Array
from benchmarks.predict.launches import Argument, Program, TensorArgument

FIRST_PARAMETER = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}
STORAGE, SCRATCH = 0x7F00_0000_0000, 0x7E00_0000_0000
STORAGE_BYTES = 1 << 33
"""Address space per storage: what leaves a tensor does not end up in another."""
STACK_TOP = 0xFFFDC0
GLOBAL = ("LDG", "STG", "LDGSTS", "LD", "ST")


class OutOfBounds(Exception):
    """A program accesses global memory outside its tensors."""


@dataclass(frozen=True)
class Placed:
    """A tensor in the address space: [begin, end)."""

    name: str
    begin: int
    end: int
    storage: int
    weight: bool


@dataclass(frozen=True)
class Execution:
    """What the warps of one program did.

    groups: (numbers of the warps, their steps) for warps that went the same way. guesses: branches on unknown data.
    """

    code: Sequence[Instruction]
    groups: list[tuple[Array, list[Step]]]
    tensors: list[Placed]
    cubin: Cubin
    warps: int
    guesses: int

    def accesses(self) -> Iterator[Access]:
        """Every memory access, each once."""
        seen: set[int] = set()
        for _, steps in self.groups:
            for _, access, _ in steps:
                if access is not None and id(access) not in seen:
                    seen.add(id(access))
                    yield access


@functools.lru_cache(maxsize=64)
def _code(listing: str) -> tuple[Instruction, ...]:
    return tuple(parse(listing))


def execute(one: Program, at: tuple[int, int, int] | None = None) -> Execution:
    """Execute the program at these indices of the grid, by default the middle one.

    OutOfBounds if it accesses memory outside its tensors, UnknownCode for code that the emulator does not know.
    """
    compiled = cubin(one.variant)
    code = _code(compiled.listing)
    constants, tensors = _bank(one)
    middle = (one.grid[0] // 2, one.grid[1] // 2, one.grid[2] // 2)
    warps = one.variant.warps
    groups, guesses = run(code, constants, warps, at or middle, warps * LANES)
    made = Execution(code, groups, tensors, compiled, warps, guesses)
    for access in made.accesses():
        if access.kind in GLOBAL:
            _check(access, tensors, one)
    return made


def _bank(one: Program) -> tuple[dict[int, int], list[Placed]]:
    """Constant bank 0 in words by byte offset, and the tensors where it says that they lie."""
    arch = one.variant.arch
    if arch not in FIRST_PARAMETER:
        raise UnknownCode(f"where sm_{arch} has a kernel's parameters; known: {sorted(FIRST_PARAMETER)}")
    bank = {0x0: one.variant.warps * LANES, 0x4: 1, 0x8: 1, 0x28: STACK_TOP}
    bank |= {0xC + 4 * i: extent for i, extent in enumerate(one.grid)}
    bank |= dict.fromkeys((0x118, 0x11C, 0x208, 0x20C), 0)  # the descriptor of global memory
    kinds, tensors = dict(one.variant.signature), []
    at = FIRST_PARAMETER[arch]
    for name, argument in (*one.arguments, ("", SCRATCH), ("", SCRATCH + (1 << 24))):
        value, size = _parameter(argument, kinds.get(name, "i64"))
        at = -(-at // size) * size
        bank |= {at + 4 * i: value >> 32 * i & 0xFFFFFFFF for i in range(size // 4)}
        at += size
        if isinstance(argument, TensorArgument):
            tensors.append(Placed(name, value, value + argument.span, argument.storage, argument.weight))
    return bank, tensors


def _parameter(argument: Argument, kind: str) -> tuple[int, int]:
    """The bits of a parameter, and its size in bytes."""
    if isinstance(argument, TensorArgument):
        return STORAGE + argument.storage * STORAGE_BYTES + argument.offset, 8
    if kind.startswith("*"):
        return 0, 8
    if kind == "fp32":
        return struct.unpack("<I", struct.pack("<f", argument))[0], 4
    if kind in ("i64", "i32"):
        assert isinstance(argument, int)
        return argument & (1 << 64) - 1, 8 if kind == "i64" else 4
    raise UnknownCode(f"a parameter of type {kind}")


def _check(access: Access, tensors: Sequence[Placed], one: Program) -> None:
    if not access.active.any():
        return
    if access.address is None:
        raise UnknownCode(f"{one.variant.kernel}: the address of an {access.kind} depends on data")
    first = access.address[access.active].astype(np.int64)
    inside = np.zeros(first.shape, dtype=bool)
    for tensor in tensors:
        inside |= (first >= tensor.begin) & (first + access.width <= tensor.end)
    if not inside.all():
        where = int(first[~inside][0])
        near = min(tensors, key=lambda t: min(abs(where - t.begin), abs(where - t.end)))
        raise OutOfBounds(
            f"{one.variant.kernel} {one.grid}: {access.kind} of {access.width} bytes at byte {where - near.begin} of "
            f"{near.name}, which has {near.end - near.begin}"
        )
