"""The control flow of one program: which instructions each warp executes, and the addresses of its memory accesses.

All warps run together while they take the same way; where they part they are executed apart. Within a warp, lanes that
jump ahead sleep until the others arrive there. Data is unknown. A branch on unknown data falls through, except over a
block that calls a function: those are the slow paths of divisions and square roots, and programs without them are what
is wanted. An instruction without a handler is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.predict.emulate import exchange, integer, memory
from benchmarks.predict.emulate.disassembly import Instruction, UnknownCode
from benchmarks.predict.emulate.memory import Handler
from benchmarks.predict.emulate.state import Step, Warps, executes
from benchmarks.predict.emulate.values import LANES, TRUE, Array, Value, both, constant

LONGEST = 400_000
"""Instructions per warp, beyond which a program is taken for an endless loop."""


def _same(names: str, handler: Handler) -> dict[str, Handler]:
    return dict.fromkeys(names.split(), handler)


HANDLERS: Mapping[str, Handler] = {
    **_same("MOV UMOV", integer.move),
    **_same("LDC ULDC LDCU", integer.load_constant),
    **_same("S2R S2UR CS2R", integer.special_register),
    **_same("IADD3 UIADD3", integer.add3),
    **_same("VIADD UVIADD", integer.add),
    **_same("IMAD UIMAD", integer.multiply_add),
    **_same("LEA ULEA", integer.shift_add),
    **_same("SHF USHF", integer.shift),
    **_same("LOP3 ULOP3", integer.logic3),
    **_same("PLOP3 UPLOP3", integer.logic_of_predicates),
    **_same("ISETP UISETP", integer.compare),
    **_same("SEL USEL FSEL", integer.choose),
    **_same("IMNMX VIMNMX UIMNMX VIADDMNMX", integer.least_or_most),
    **_same("PRMT UPRMT", integer.permute),
    **_same("SGXT USGXT", integer.extend_sign),
    **_same("IABS", integer.absolute),
    **_same("I2F I2FP UI2F", exchange.to_float),
    **_same("F2I", exchange.to_integer),
    **_same("MUFU", exchange.reciprocal),
    **_same("FADD FMUL FFMA", exchange.float_multiply_add),
    **_same("R2UR", exchange.to_uniform),
    **_same("VOTE VOTEU", exchange.vote),
    **_same("SHFL", exchange.shuffle),
    **_same("P2R", exchange.predicates_to_register),
    **_same("R2P", exchange.register_to_predicates),
    **_same("HFMA2 HADD2", exchange.half_constant),
    **_same("LDG LD LDS LDL", memory.load),
    **_same("STG ST STS STL", memory.store),
    **_same("LDSM", memory.load_matrices),
    **_same("STSM", memory.store_matrices),
    **_same("LDGSTS", memory.copy_async),
    **_same("HMMA QMMA HGMMA QGMMA", memory.mma),
    **_same(
        "FMNMX FSETP FCHK FSET HMUL2 HSETP2 HMNMX2 VHMNMX F2FP F2F FRND FSWZADD MOVM POPC UPOPC FLO UFLO BREV UBREV "
        "BMSK UBMSK I2I I2IP IDP REDUX CREDUX VABSDIFF LEPC",
        memory.unknown(1),
    ),
    **_same("DADD DMUL DFMA DSETP", memory.unknown(2)),
    **_same(
        "NOP BSSY BSYNC BREAK WARPSYNC ACQBULK PREEXIT BAR DEPBAR LDGDEPBAR MEMBAR FENCE WARPGROUP YIELD CCTL ERRBAR "
        "BMOV NANOSLEEP",
        memory.nothing,
    ),
}
JUMPS = ("BRA", "CALL", "RET", "EXIT")


def run(
    code: Sequence[Instruction],
    constants: Mapping[int, int],
    warps: int,
    program: tuple[int, int, int],
    threads: int,
) -> tuple[list[tuple[Array, list[Step]]], int]:
    """The traces of a program: (numbers of the warps, their steps) for each group of warps that went the same way.

    constants: bank 0, words by byte offset. program: its indices in the grid. Also returns how many branches depended
    on unknown data. UnknownCode for an instruction that is not known, or for a program that does not end.
    """
    numbers = np.arange(warps)
    special: dict[str, Array] = {
        "SR_TID.X": numbers[:, None] * LANES + np.arange(LANES),
        "SR_LANEID": np.arange(LANES)[None],
        "SR_CTAID.X": constant(program[0]),
        "SR_CTAID.Y": constant(program[1]),
        "SR_CTAID.Z": constant(program[2]),
        "SR_NTID.X": constant(threads),
        **{name: constant(0) for name in ("SR_TID.Y", "SR_TID.Z", "SR_CgaCtaId")},
    }
    waiting = [Warps(numbers, constants, special)]
    finished, guesses = [], 0
    while waiting:
        w = waiting.pop()
        others, guessed = _run_together(code, w)
        waiting += others
        guesses += guessed
        finished.append((w.numbers, w.trace)) if not others else None
    return finished, guesses


def _run_together(code: Sequence[Instruction], w: Warps) -> tuple[list[Warps], int]:
    """Execute until the warps end, or part: then return the groups that go on, each a state of its own."""
    guesses = 0
    while w.at < len(code):
        if len(w.trace) > LONGEST:
            raise UnknownCode(f"more than {LONGEST} instructions per warp")
        if w.sleeping:
            _least_first(w)
        i = code[w.at]
        guard = w.guard(i.guard)
        if i.base not in JUMPS:
            handler = HANDLERS.get(i.base)
            if handler is None:
                raise UnknownCode(i.text)
            access = handler(w, i, guard)
            w.trace.append((w.at, access, executes(guard)))
            w.at += 1
            continue
        w.trace.append((w.at, None, True))
        groups, guessed = _jump(code, w, i, guard)
        guesses += guessed
        if groups:
            return groups, guesses
    return [], guesses


def _jump(code: Sequence[Instruction], w: Warps, i: Instruction, guard: Value) -> tuple[list[Warps], bool]:
    """Execute an instruction of JUMPS: the groups into which the warps part, if they do; whether it was a guess."""
    if i.base == "RET":
        if not w.calls:
            raise UnknownCode(f"{i.text}: returns from nowhere")
        w.at = w.calls.pop()
        return [], False
    if i.base == "EXIT":
        return _exit(w, guard, len(code)), False
    if i.target is None:
        raise UnknownCode(i.text)
    if i.target == w.at:
        w.at = len(code)  # the endless loop that follows the code
        return [], False
    for o in i.operands:
        if o.is_predicate:
            guard = both(guard, w.predicate(o))
    after = w.at + 1
    groups = _branch(code, w, i, guard)
    if i.base == "CALL":  # with a guard it may be a mere jump out of a loop, from which nothing returns
        for state in groups or [w]:
            if state.at == i.target:
                state.calls.append(after)
    return groups, guard is None


def _least_first(w: Warps) -> None:
    """Of the lanes' instructions the first is executed next, so that lanes meet again where their ways do."""
    here = w.lanes(TRUE if w.alive is None else w.alive)
    lanes: dict[int, Array] = {}
    for at, some in [(w.at, here), *w.sleeping]:
        lanes[at] = lanes[at] | some if at in lanes else some
    w.at = min(lanes)
    w.alive = lanes.pop(w.at)
    w.sleeping = list(lanes.items())


def _exit(w: Warps, guard: Value, end: int) -> list[Warps]:
    """Lanes leave; a warp ends with its last. Where warps differ, return the groups."""
    present = w.lanes(TRUE if w.alive is None else w.alive)
    left = present if guard is None else present & ~guard
    ends = np.asarray(~left.any(1))
    if ends.all():
        w.at, w.alive = w.sleeping.pop() if w.sleeping else (end, None)
        return []
    if ends.any() and not w.sleeping:
        done, others = w.part(ends), w.part(~ends)
        done.at = end
        others.at, others.alive = w.at + 1, left[~ends]
        return [done, others]
    w.at += 1
    w.alive = None if left.all() else left
    return []


def _branch(code: Sequence[Instruction], w: Warps, i: Instruction, guard: Value) -> list[Warps]:
    """Go on at the target or after the branch; where warps differ, return one state for each way."""
    after, target = w.at + 1, i.target
    assert target is not None
    if guard is None:
        if target < w.at:
            raise UnknownCode(f"{i.text}: the end of a loop depends on data")
        w.at = target if any(one.base == "CALL" for one in code[after:target]) else after
        return []
    if "DIV" in i.flags:  # taken where lanes of a warp are apart
        w.at = after
        return []
    jumping = w.lanes(guard)
    staying = ~jumping if w.alive is None else w.lanes(w.alive) & ~jumping
    jump, stay = np.asarray(jumping.any(1)), np.asarray(staying.any(1))
    if jump.all() and not stay.any():
        w.at = target
        return []
    if not jump.any():
        w.at = after
        return []
    groups = []
    for chosen in (jump & ~stay, ~jump, jump & stay):
        if chosen.any():
            state = w.part(chosen)
            state.at = target if jump[chosen].any() else after
            if (jump & stay)[chosen].any():
                state.alive = jumping[chosen]
                state.sleeping.append((after, staying[chosen]))
            groups.append(state)
    return groups
