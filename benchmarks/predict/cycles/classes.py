"""Which pipe an instruction occupies, and what else the model does with it: the numbers that sm.cpp knows."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from benchmarks.predict.emulate.disassembly import Instruction


class Pipe(enum.IntEnum):
    """The pipes of a scheduler, in sm.cpp's order."""

    NONE, ALU, FMA, FMA_HEAVY, XU, LSU, TENSOR, FP64 = range(8)


class Kind(enum.IntEnum):
    """What an instruction does beyond occupying its pipe, in sm.cpp's order."""

    OTHER, LOAD, STORE, COPY_ASYNC, SHARED_LOAD, SHARED_STORE, SHUFFLE, BARRIER, WAIT_SCOREBOARD, CLOSE_COPIES = range(
        10
    )
    WGMMA, WAIT_WGMMA, LONG_RESULT, SPECIAL, CONSTANT, FENCE, MMA, BRANCH = range(10, 18)


def _all(names: str, pipe: Pipe, kind: Kind = Kind.OTHER) -> dict[str, tuple[Pipe, Kind]]:
    return dict.fromkeys(names.split(), (pipe, kind))


CLASSES: dict[str, tuple[Pipe, Kind]] = {
    **_all(
        "IADD3 LOP3 LEA SHF ISETP FSETP SEL FSEL PRMT FMNMX F2FP VIADD IABS PLOP3 SGXT VIMNMX VIADDMNMX MOV I2FP IMNMX "
        "VOTE FCHK P2R R2P CS2R BMSK VHMNMX HMNMX2 HSETP2 LEPC R2UR FSET VABSDIFF",
        Pipe.ALU,
    ),
    **_all("FFMA FMUL FADD FSWZADD", Pipe.FMA),
    **_all("IMAD HADD2 HMUL2 HFMA2 IDP", Pipe.FMA_HEAVY),
    **_all("MUFU I2F F2I F2F FRND POPC FLO BREV I2I I2IP", Pipe.XU, Kind.LONG_RESULT),
    **_all("DADD DMUL DFMA DSETP", Pipe.FP64),
    **_all("LDG LD LDL", Pipe.LSU, Kind.LOAD),
    **_all("STG ST STL", Pipe.LSU, Kind.STORE),
    **_all("LDGSTS", Pipe.LSU, Kind.COPY_ASYNC),
    **_all("LDS LDSM", Pipe.LSU, Kind.SHARED_LOAD),
    **_all("STS STSM", Pipe.LSU, Kind.SHARED_STORE),
    **_all("SHFL REDUX CREDUX MOVM", Pipe.LSU, Kind.SHUFFLE),
    **_all("HGMMA QGMMA", Pipe.TENSOR, Kind.WGMMA),
    **_all("HMMA QMMA", Pipe.TENSOR, Kind.MMA),
    **_all("BAR", Pipe.NONE, Kind.BARRIER),
    **_all("DEPBAR", Pipe.NONE, Kind.WAIT_SCOREBOARD),
    **_all("LDGDEPBAR", Pipe.NONE, Kind.CLOSE_COPIES),
    **_all("S2R S2UR", Pipe.NONE, Kind.SPECIAL),
    **_all("LDC", Pipe.NONE, Kind.CONSTANT),
    **_all("FENCE MEMBAR", Pipe.NONE, Kind.FENCE),
    **_all("BRA", Pipe.NONE, Kind.BRANCH),
}
"""Everything else, uniform instructions among it, takes an issue slot and no pipe that binds."""
FENCE_CYCLES = {"FENCE": 25, "MEMBAR": 10}
SCOREBOARD = re.compile(r"SB(\d)")

INSTRUCTION = np.dtype(
    [
        (name, np.int32)
        for name in (
            "pipe", "kind", "stall", "write_barrier", "read_barrier", "wait", "amount", "barrier", "from_registers",
            "closes_group", "eight_bit",
        )
    ]
)  # fmt: skip
"""sm.cpp's `Instruction`."""


def class_of(i: Instruction) -> tuple[Pipe, Kind]:
    """Pipe and kind of an instruction."""
    if i.base == "WARPGROUP" and i.modifiers[:1] == ("DEPBAR",):
        return Pipe.NONE, Kind.WAIT_WGMMA
    return CLASSES.get(i.base, (Pipe.NONE, Kind.OTHER))


def table(code: Sequence[Instruction]) -> NDArray[np.void]:
    """The instructions as sm.cpp reads them, [n] of INSTRUCTION."""
    made = np.zeros(len(code), dtype=INSTRUCTION)
    for row, i in zip(made, code, strict=True):
        pipe, kind = class_of(i)
        amount = barrier = 0
        if kind is Kind.WAIT_SCOREBOARD:
            found = SCOREBOARD.search(i.text)
            barrier = int(found[1]) if found else 0
            amount = next((o.index for o in i.operands[1:] if o.file == "number"), 0)
        elif kind is Kind.WAIT_WGMMA:
            amount = i.operands[1].index
        elif kind is Kind.WGMMA:
            amount = shape(i)[1]
            row["from_registers"] = i.operands[1].file == "R"
            row["closes_group"] = "gsb0" in i.text
            row["eight_bit"] = i.base == "QGMMA"
        elif kind is Kind.FENCE:
            amount = FENCE_CYCLES[i.base]
        elif kind is Kind.MMA:
            amount = 1
        row["pipe"], row["kind"], row["amount"], row["barrier"] = pipe, kind, amount, barrier
        row["stall"], row["wait"] = i.stall, i.wait
        row["write_barrier"], row["read_barrier"] = i.write_barrier, i.read_barrier
    return made


MMA_SHAPES = {"16816": (16, 8, 16), "1688": (16, 8, 8), "16832": (16, 8, 32)}


def shape(i: Instruction) -> tuple[int, int, int]:
    """(m, n, k) of a matrix instruction, per warp group for HGMMA and QGMMA."""
    name = i.modifiers[0]
    if "x" in name:
        m, n, k = map(int, name.split("x"))
        return m, n, k
    return MMA_SHAPES[name]


def flops(i: Instruction) -> float:
    """FLOPs of a matrix instruction by one warp; 0 for any other."""
    if class_of(i)[1] not in (Kind.WGMMA, Kind.MMA):
        return 0
    m, n, k = shape(i)
    return 2 * m * n * k / (4 if class_of(i)[1] is Kind.WGMMA else 1)
