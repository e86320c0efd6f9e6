"""The emulator: integer arithmetic as the hardware does it, control flow, and what it refuses to guess."""

import operator
import random

import pytest

from benchmarks.predict.emulate import emulator
from benchmarks.predict.emulate.disassembly import UnknownCode
from tests.benchmarks.predict.code import execute, stored

LANES = list(range(32))
LANE = "S2R R9, SR_TID.X"


def both(text: str, a: int, b: int) -> int:
    """R0 after the text, with a and b in c[0x0][0x0] and c[0x0][0x4]."""
    found = stored(text, {0x0: a & 0xFFFFFFFF, 0x4: b & 0xFFFFFFFF})
    assert len(set(found)) == 1
    return found[0]


EDGES = [0, 1, 2, 31, 32, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF, 0x12345678]
PAIRS = [(a, b) for a in EDGES for b in EDGES]


def signed(a: int) -> int:
    return a - (1 << 32) if a >> 31 else a


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("IADD3 R0, R2, R3, RZ", lambda a, b: a + b),
        ("IADD3 R0, R2, -R3, 0x5", lambda a, b: a - b + 5),
        ("IMAD R0, R2, R3, 0x7", lambda a, b: a * b + 7),
        ("IMAD.HI.U32 R0, R2, R3, RZ", lambda a, b: a * b >> 32),
        ("IMAD.HI R0, R2, R3, RZ", lambda a, b: signed(a) * signed(b) >> 32),
        ("IMAD.WIDE.U32 R4, R2, R3, RZ\nMOV R0, R5", lambda a, b: a * b >> 32),
        ("IMAD.WIDE R4, R2, R3, RZ\nMOV R0, R5", lambda a, b: signed(a) * signed(b) >> 32),
        ("LEA R0, R2, R3, 0x4", lambda a, b: (a << 4) + b),
        ("LEA.HI R0, R2, R3, RZ, 0x4", lambda a, b: (a >> 28) + b),
        ("LEA.HI.SX32 R0, R2, R3, 0x4", lambda a, b: (signed(a) >> 28) + b),
        ("SHF.R.U32.HI R0, RZ, 0x5, R2", lambda a, b: a >> 5),
        ("SHF.R.S32.HI R0, RZ, 0x5, R2", lambda a, b: signed(a) >> 5),
        ("SHF.L.U32 R0, R2, 0x5, RZ", lambda a, b: a << 5),
        ("SHF.L.U64.HI R0, R2, 0x5, R3", lambda a, b: ((b << 32 | a) << 5) >> 32),
        ("SHF.R.U64 R0, R2, 0x5, R3", lambda a, b: (b << 32 | a) >> 5),
        ("LOP3.LUT R0, R2, R3, RZ, 0xc0, !PT", lambda a, b: a & b),
        ("LOP3.LUT R0, R2, R3, RZ, 0x3c, !PT", lambda a, b: a ^ b),
        ("LOP3.LUT R0, RZ, R3, RZ, 0x33, !PT", lambda a, b: ~b),
        ("VIMNMX R0, R2, R3, PT", lambda a, b: min(signed(a), signed(b))),
        ("VIMNMX.U32 R0, R2, R3, !PT", lambda a, b: max(a, b)),
        ("IABS R0, R2", lambda a, b: abs(signed(a))),
        ("PRMT R0, R2, 0x5410, R3", lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16),
        ("PRMT R0, R2, 0x8888, RZ", lambda a, b: 0xFFFFFFFF if a >> 7 & 1 else 0),
        ("SGXT R0, R2, 0x8", lambda a, b: (a & 0xFF) - (0x100 if a & 0x80 else 0)),
        ("ISETP.GT.AND P0, PT, R2, R3, PT\nSEL R0, R2, R3, P0", lambda a, b: max(signed(a), signed(b))),
        ("ISETP.GE.U32.AND P0, P1, R2, R3, PT\nSEL R0, R2, R3, P1", lambda a, b: min(a, b)),
        ("HFMA2.MMA R0, -RZ, RZ, 1.5, 1", lambda a, b: 0x3E003C00),
    ],
)
def test_arithmetic_of_32_bits(text: str, expected) -> None:  # type: ignore[no-untyped-def]
    for a, b in PAIRS[:: 7 if "WIDE" in text else 3]:
        found = both(f"MOV R2, c[0x0][0x0]\nMOV R3, c[0x0][0x4]\n{text}", a, b)
        assert found == expected(a, b) & 0xFFFFFFFF, (hex(a), hex(b))


WORDS = """
    LDC.64 R2, c[0x0][0x0]
    LDC.64 R4, c[0x0][0x8]
"""
LONG_PAIRS = [
    (1 << 40, 1 << 41),
    (0xFFFFFFFF, 1),
    (0x1FFFFFFFF, 0xFFFFFFFF00000001),
    (5, 7),
    (7, 5),
    (1 << 40, 1 << 40),
    (1 << 40, 1 << 41),
]


def of_64_bits(text: str, a: int, b: int) -> int:
    """R0 after the text, with a in R2 and R3, b in R4 and R5."""
    return stored(WORDS + text, {0: a & 0xFFFFFFFF, 4: a >> 32, 8: b & 0xFFFFFFFF, 12: b >> 32})[0]


@pytest.mark.parametrize(("a", "b"), LONG_PAIRS)
def test_64_bit_addition_by_carries(a: int, b: int) -> None:
    text = "IADD3 R6, P0, R2, R4, RZ\nIADD3.X R0, R3, R5, RZ, P0, !PT"
    assert of_64_bits(text, a, b) == (a + b) >> 32 & 0xFFFFFFFF


@pytest.mark.parametrize("relation", ["LT", "LE", "GT", "GE", "EQ", "NE"])
def test_64_bit_comparison_by_halves(relation: str) -> None:
    text = f"""
        ISETP.{relation}.U32.AND P0, PT, R2, R4, PT
        ISETP.{relation}.U32.AND.EX P0, PT, R3, R5, PT, P0
        MOV R7, 0x1
        SEL R0, R7, RZ, P0
    """
    for a, b in LONG_PAIRS:
        assert of_64_bits(text, a, b) == getattr(operator, relation.lower())(a, b), (a, b)


DIVISION = """
    MOV R2, c[0x0][0x0]
    MOV R3, c[0x0][0x4]
    I2F.U32.RP R4, R3
    MUFU.RCP R4, R4
    IADD3 R4, R4, 0xffffffe, RZ
    F2I.FTZ.U32.TRUNC.NTZ R5, R4
    MOV R4, RZ
    IMAD R6, R5, R3, RZ
    IADD3 R6, -R6, RZ, RZ
    IMAD.HI.U32 R7, R5, R6, R4
    IMAD.HI.U32 R0, R7, R2, RZ
    IMAD R8, R0, R3, RZ
    IADD3 R8, R2, -R8, RZ
    ISETP.GE.U32.AND P0, PT, R8, R3, PT
    @P0 IADD3 R8, R8, -R3, RZ
    @P0 IADD3 R0, R0, 0x1, RZ
    ISETP.GE.U32.AND P1, PT, R8, R3, PT
    @P1 IADD3 R0, R0, 0x1, RZ
"""
"""The compiler's division of unsigned numbers; IMAD.HI takes the pair (R5:R4) as its addend."""


def test_the_compilers_division() -> None:
    chosen = random.Random(0)
    cases = [(7, 3), (10**9, 7), (2**32 - 1, 2**16), (5, 9), (96, 96)]
    cases += [(chosen.randrange(2**32), chosen.randrange(1, 2**20)) for _ in range(20)]
    for a, b in cases:
        assert both(DIVISION, a, b) == a // b, (a, b)


def test_lanes_and_programs() -> None:
    assert stored(f"{LANE}\nMOV R0, R9") == LANES
    assert stored("S2R R0, SR_CTAID.Y") == [2] * 32
    assert stored(f"{LANE}\nSHFL.BFLY PT, R0, R9, 0x4, 0x1f") == [lane ^ 4 for lane in LANES]
    assert stored(f"{LANE}\nR2UR UR4, R9\nMOV R0, UR4") == [0] * 32


def steps_of(text: str, constants: dict[int, int] | None = None, warps: int = 1) -> list[list[int]]:
    """Per warp the indices of the instructions it executes."""
    groups, _ = execute(text, constants, warps)
    found = {int(warp): [at for at, _, _ in steps] for numbers, steps in groups for warp in numbers}
    return [found[warp] for warp in sorted(found)]


LOOP = """
    MOV R2, RZ
    .L_x_0:
    IADD3 R2, R2, 0x1, RZ
    ISETP.LT.AND P0, PT, R2, c[0x0][0x0], PT
    @P0 BRA `(.L_x_0)
"""


def test_a_loop_runs_as_often_as_its_bound_says() -> None:
    (steps,) = steps_of(LOOP, {0: 10})
    assert steps.count(1) == 10


def test_the_end_of_a_loop_must_not_depend_on_data() -> None:
    with pytest.raises(UnknownCode, match="end of a loop depends on data"):
        execute("MOV R4, RZ\nMOV R5, RZ\nLDS R6, [R4]\n" + LOOP.replace("c[0x0][0x0]", "R6"))


def test_an_endless_loop_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "LONGEST", 1000)
    with pytest.raises(UnknownCode, match="instructions per warp"):
        execute("MOV R2, RZ\n.L_x_0:\nNOP\nBRA `(.L_x_0)")


def test_a_guarded_call_is_a_jump() -> None:
    """ptxas leaves loops by such calls."""
    text = "ISETP.NE.AND P0, PT, RZ, c[0x0][0x0], PT\n@P0 CALL.REL.NOINC `(.L_x_1)\nMOV R2, RZ\n.L_x_1:\nMOV R3, RZ"
    assert steps_of(text, {0: 1}) == [[0, 1, 3, 4]]
    assert steps_of(text, {0: 0}) == [[0, 1, 2, 3, 4]]


def test_a_function_returns_to_its_caller() -> None:
    text = "CALL.REL.NOINC `(.L_x_1)\nMOV R0, 0x5\nEXIT\n.L_x_1:\nMOV R2, RZ\nRET.REL.NODEC R4 `(linear)"
    assert steps_of(text) == [[0, 3, 4, 1, 2]]


def test_lanes_that_jump_ahead_meet_the_others() -> None:
    text = f"""
        {LANE}
        ISETP.LT.AND P0, PT, R9, 0x8, PT
        MOV R0, 0x64
        @P0 BRA `(.L_x_0)
        MOV R0, 0xc8
        BRA `(.L_x_1)
        .L_x_0:
        IADD3 R0, R0, R9, RZ
        .L_x_1:
        NOP
    """
    assert stored(text) == [100 + lane if lane < 8 else 200 for lane in LANES]
    (steps,) = steps_of(text)
    assert steps == list(range(9)), "lanes that meet again go on together"


def test_lanes_leave_a_loop_one_after_another() -> None:
    text = f"""
        {LANE}
        MOV R0, RZ
        .L_x_0:
        IADD3 R0, R0, 0x2, RZ
        ISETP.LT.AND P0, PT, R0, R9, PT
        @P0 BRA `(.L_x_0)
        IADD3 R0, R0, 0x100, RZ
    """
    assert stored(text) == [0x100 + max(2, lane + lane % 2) for lane in LANES]
    (steps,) = steps_of(text)
    assert (steps.count(2), steps.count(5)) == (16, 1)


def test_lanes_that_exit_early_store_nothing() -> None:
    groups, _ = execute(f"{LANE}\nISETP.GE.AND P0, PT, R9, 0x8, PT\n@P0 EXIT\nSTS [R9], R9")
    ((_, steps),) = groups
    access = next(access for _, access, _ in steps if access is not None)
    assert access.active[0].tolist() == [lane < 8 for lane in LANES]


def test_warps_part_where_their_ways_do() -> None:
    text = f"{LANE}\nISETP.GE.AND P0, PT, R9, 0x40, PT\n@P0 BRA `(.L_x_0)\nNOP\nNOP\n.L_x_0:\nNOP"
    first, second, third, fourth = steps_of(text, warps=4)
    assert first == second == [0, 1, 2, 3, 4, 5, 6]
    assert third == fourth == [0, 1, 2, 5, 6]


def test_warps_end_apart() -> None:
    text = f"{LANE}\nISETP.GE.AND P0, PT, R9, 0x20, PT\n@P0 EXIT\nNOP"
    assert steps_of(text, warps=2) == [[0, 1, 2, 3, 4], [0, 1, 2]]


def test_a_branch_on_data_falls_through_except_over_a_slow_path() -> None:
    load = "MOV R4, RZ\nLDS R6, [R4]\nISETP.EQ.AND P0, PT, R6, RZ, PT\n@P0 BRA `(.L_x_0)\n"
    assert steps_of(load + "NOP\n.L_x_0:\nNOP") == [[0, 1, 2, 3, 4, 5, 6]]
    slow = load + "CALL.REL.NOINC `(.L_x_1)\n.L_x_0:\nEXIT\n.L_x_1:\nRET.REL.NODEC R2 `(linear)"
    assert steps_of(slow) == [[0, 1, 2, 3, 5]]


def test_what_was_loaded_is_unknown() -> None:
    groups, _ = execute("MOV R4, RZ\nLDS R6, [R4]\nSTS [R6], R4")
    ((_, steps),) = groups
    assert [access.address is None for _, access, _ in steps if access is not None] == [False, True]


def test_lanes_that_kept_unknown_data_hold_an_address_outside_every_tensor() -> None:
    text = f"{LANE}\nMOV R4, RZ\nLDS R0, [R4]\nISETP.LT.AND P0, PT, R9, 0x8, PT\n@P0 MOV R0, 0x10"
    assert stored(text) == [0x10 if lane < 8 else 0x5A5A5A5A for lane in LANES]


def test_a_load_may_overwrite_its_own_address() -> None:
    groups, _ = execute("MOV R4, 0x40\nLDS R4, [R4]")
    ((_, steps),) = groups
    access = next(access for _, access, _ in steps if access is not None)
    assert access.address is not None
    assert int(access.address[0, 0]) == 0x40


def test_nothing_returns_without_a_call() -> None:
    with pytest.raises(UnknownCode, match="returns from nowhere"):
        execute("RET.REL.NODEC R2 `(linear)")


@pytest.mark.parametrize("text", ["FROBNICATE R0, R1", "LDC.U8 R0, c[0x0][0x0]", "IADD3 R0, SR_LANEID, RZ, RZ"])
def test_unknown_code_is_an_error(text: str) -> None:
    with pytest.raises(UnknownCode):
        execute(text)
