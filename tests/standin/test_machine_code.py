"""What has to be in a certain order in the machine code of kernels, whatever ptxas does with PTX (`sass.py`)."""

from __future__ import annotations

import pytest

from benchmarks.static.machine_code import compile_all, sass
from tests.standin.machine_code import merges, one_of_each
from tests.standin.sass import EARLY, WAIT, barrier_before_reloading, instructions, waits_first

ARCHS = (90, 120)
"""Where a launch may begin before the one before it has finished."""


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_wait_before_they_touch_memory(arch: int) -> None:
    variants = one_of_each(arch)
    assert len(variants) >= 30
    for name, code in zip(variants, compile_all(variants.values(), 1, None, sass), strict=True):
        assert waits_first(instructions(code)), name


@pytest.mark.long
@pytest.mark.parametrize("arch", ARCHS)
def test_a_barrier_before_what_others_stored(arch: int) -> None:
    variants = merges(arch)
    assert variants
    for code in compile_all(variants, 1, None, sass):
        assert barrier_before_reloading(instructions(code))


def test_orders_are_told_apart() -> None:
    """Of instructions as cuobjdump prints them."""
    text = "\n".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x00000000000079c3 */"
        for i, line in enumerate(("S2R R0, SR_CTAID.X", "ACQBULK", "@!P0 LDG.E.64 R2, desc[UR4][R2.64]", "EXIT"))
    )
    assert instructions(text) == ["S2R", "ACQBULK", "LDG.E.64", "EXIT"]
    assert waits_first([WAIT, "LDG.E", EARLY[0], "STG.E"])
    assert waits_first([WAIT, "EXIT"])
    for wrong in (["LDG.E", WAIT], ["LDG.E"], [EARLY[0], WAIT, "LDG.E"], ["LDGSTS.E", WAIT, "STG.E"]):
        assert not waits_first(wrong)
    loop = ["LDG.E", "STG.E", "BAR.SYNC", "LDG.E", "BAR.SYNC"]
    assert barrier_before_reloading([*loop, "LDG.E", "STG.E"])
    assert not barrier_before_reloading([*loop[:-1], "LDG.E", "STG.E"])
