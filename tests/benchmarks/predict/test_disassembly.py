"""Machine code as instructions: operands, guards, targets and control bits."""

import pytest

from benchmarks.predict.emulate.disassembly import NO_SCOREBOARD, UnknownCode, operand, parse, split
from tests.benchmarks.predict.code import code, listing

REAL = """
linear:
.text.linear:
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000e620000000800 */
.L_x_1:
        /*0010*/              @!P1 BRA `(.L_x_1) ;                           /* 0xfffffff800ac9947 */
                                                                             /* 0x000fea0003800000 */
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0 ; /* 0x00e00000081879f0 */
                                                                             /* 0x003fe40008000a00 */
"""


def test_a_real_listing() -> None:
    load, branch, mma = parse(REAL)
    assert (load.base, load.stall, load.write_barrier, load.read_barrier, load.wait) == ("LDC", 1, 1, NO_SCOREBOARD, 0)
    assert branch.target == 1
    assert branch.guard is not None
    assert (branch.guard.file, branch.guard.index, branch.guard.negated) == ("P", 1, True)
    assert (mma.base, mma.modifiers, mma.wait) == ("HGMMA", ("64x64x16", "F32"), 0b11)


@pytest.mark.parametrize(
    ("text", "file", "index"),
    [
        ("R12", "R", 12),
        ("RZ", "R", -1),
        ("UR4", "UR", 4),
        ("URZ", "UR", -1),
        ("!PT", "P", -1),
        ("UP3", "UP", 3),
        ("c[0x0][0x210]", "constant", 0x210),
        ("c[0x4][0x8]", "constant", -1),
        ("0xffffffff", "number", 0xFFFFFFFF),
        ("-0x1", "number", 0xFFFFFFFF),
        ("1", "number", 0x3F800000),
        ("-2.5", "number", 0xC0200000),
        ("+INF", "number", 0x7F800000),
        ("SR_TID.X", "other", -1),
    ],
)
def test_operands(text: str, file: str, index: int) -> None:
    assert (operand(text).file, operand(text).index) == (file, index)


def test_signs_and_parts() -> None:
    one = operand("-R4.H1_H1")
    assert (one.negated, one.part, one.index) == (True, "H1_H1", 4)
    assert operand("~R4.reuse").inverted
    assert operand("|R4|").absolute
    assert operand("-|R4|").negated
    assert operand("R2.64").part == "64"


def test_memory_operands_are_sums() -> None:
    terms = operand("desc[UR16][R110.64+UR4+-0x20]").terms
    assert [(one.file, one.index, one.part) for one in terms] == [
        ("R", 110, "64"),
        ("UR", 4, ""),
        ("number", 2**32 - 32, ""),
    ]


def test_commas_inside_brackets_do_not_separate() -> None:
    assert list(split("R0, c[0x0][0x4], [R1+0x8], P0")) == ["R0", "c[0x0][0x4]", "[R1+0x8]", "P0"]


def test_text_of_another_form_is_an_error() -> None:
    with pytest.raises(UnknownCode, match="0 instructions"):
        parse("nothing")
    with pytest.raises(UnknownCode, match="1 instructions and 0"):
        parse(listing("NOP").splitlines()[0])


def test_labels_are_indices() -> None:
    assert code("NOP\n.L_x_0:\nNOP\nBRA `(.L_x_0)")[2].target == 1
