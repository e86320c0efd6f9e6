"""The cycle model: stalls, scoreboards, pipes, caches and bandwidth, from traces made by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.predict import model
from benchmarks.predict.cycles import sm
from benchmarks.predict.cycles.classes import class_of, flops, table
from benchmarks.predict.cycles.machines import MACHINES, at_clock
from benchmarks.predict.cycles.traffic import ACCESS, STEP, Traffic
from tests.benchmarks.predict.code import code

pytestmark = pytest.mark.skipif(sm.compiler() is None, reason="the cycle model needs a C++ compiler")
H200 = MACHINES[90]
SMS = H200.card.multiprocessors


def run(
    text: str,
    accesses: Sequence[tuple[int, ...]] = (),
    sectors: Sequence[int] = (),
    *,
    warps: int = 1,
    programs: int = 1,
    resident: int = 1,
    tensors: Sequence[tuple[float, int, int]] = ((0.0, 1, 0),),
    repeat: int = 1,
    waits_for_loads: bool = False,
    stall: int = 1,
) -> dict[str, float]:
    """Each warp executes the text `repeat` times; the memory instructions take the accesses in order.

    waits_for_loads: loads set scoreboard 0, and the last instruction waits for it.
    """
    instructions = [dataclasses.replace(one, stall=stall) for one in code(text)[:-1]]
    if waits_for_loads:
        held = [dataclasses.replace(one, write_barrier=0) for one in instructions[:-1]]
        instructions = [*held, dataclasses.replace(instructions[-1], wait=1)]
    places = iter(range(len(accesses)))
    kinds = ("LDG", "STG", "LDGSTS", "LDS", "STS")
    one = [(n, next(places, -1) if i.base in kinds else -1) for n, i in enumerate(instructions)]
    steps = np.array(one * repeat * warps, dtype=STEP)
    first = np.arange(warps + 1, dtype=np.int64) * len(one) * repeat
    made = Traffic(np.array(list(accesses), dtype=ACCESS), np.array(sectors, np.int64), steps, first, [])
    constants = model._shares(H200, programs * SMS, programs, resident, 0) | {"fetch_cycles": 0}
    return sm.simulate(constants, table(instructions), made, tensors, programs, resident)


def test_one_warp_issues_once_per_stall() -> None:
    assert run("NOP", repeat=1000)["cycles"] == pytest.approx(1000, abs=20)
    assert run("NOP", repeat=1000, stall=4)["cycles"] == pytest.approx(4000, abs=20)
    assert run("NOP", repeat=1000, stall=4, warps=16)["cycles"] == pytest.approx(4000, abs=60)


def test_four_schedulers_issue_at_once() -> None:
    result = run("NOP", repeat=1000, warps=16)
    assert result["cycles"] == pytest.approx(4000, abs=60)
    assert result["issued"] == 16000


@pytest.mark.parametrize(
    ("text", "cycles"), [("IADD3 R0, R1, R2, RZ", 2), ("FFMA R0, R1, R2, R3", 1), ("MUFU.EX2 R0, R1", 8)]
)
def test_pipes_bound_the_rate(text: str, cycles: int) -> None:
    """Per scheduler of an H200: 16 integer lanes, two pipes of 16 for float32, 4 special-function units."""
    assert run(text, repeat=1000, warps=8)["cycles"] == pytest.approx(2000 * cycles, rel=0.03)


def test_bank_conflicts_take_the_shared_memory() -> None:
    conflicting = [(32, 0, -1, 0, 0, 0)]
    result = run("LDS R0, [R1]", conflicting, warps=4, programs=1)
    assert result["shared"] == 4 * 32
    assert run("LDS R0, [R1]", [(1, 0, -1, 0, 0, 0)], warps=4)["shared"] == 4


def test_what_is_loaded_again_comes_from_the_l1() -> None:
    lines = list(range(16))
    once, again = (4, 4, 0, 0, 0, 16), (4, 4, 0, 0, 0, 16)
    result = run("LDG.E.128 R0, [R4.64]\nLDG.E.128 R8, [R4.64]", [once, again], lines)
    assert (result["l1_misses"], result["l1_hits"]) == (16, 16)
    assert result["l2_bytes"] == 16 * 32
    past = run("LDG.E.128 R0, [R4.64]\nLDG.E.128 R8, [R4.64]", [(4, 4, 0, 1, 0, 16)] * 2, lines)
    assert past["l2_bytes"] == 2 * 16 * 32


@pytest.mark.parametrize(("share", "rate"), [(0.0, H200.l2_rate / SMS), (1.0, H200.memory / H200.clock / SMS)])
def test_loads_reach_the_bandwidth_and_not_more(share: float, rate: float) -> None:
    """One SM of many: its share of the L2's bytes per cycle, or of the DRAM's."""
    count = 400
    accesses = [(4, 4, 0, 1, 16 * n, 16) for n in range(count)]
    text = "LDG.E.128 R0, [R4.64]\n" * count + "NOP"
    result = run(text, accesses, range(16 * count), warps=16, tensors=[(share, 0, 0)], waits_for_loads=True)
    moved = 16 * count * 16 * 32
    assert result["l2_bytes"] == moved
    assert moved / result["cycles"] == pytest.approx(rate, rel=0.1)
    assert moved / result["end"] <= rate * 1.01


def test_programs_follow_one_another() -> None:
    one = run("NOP", repeat=1000, warps=4, programs=1)["cycles"]
    assert run("NOP", repeat=1000, warps=4, programs=3, resident=1)["cycles"] == pytest.approx(3 * one, rel=0.15)
    assert run("NOP", repeat=1000, warps=4, programs=3, resident=3)["cycles"] == pytest.approx(3 * one, rel=0.15)


def test_programs_that_wait_for_each_other_are_an_error() -> None:
    """A warp that waits for a scoreboard that nothing releases: the trace cannot be right."""
    instructions = code("DEPBAR.LE SB0, 0x0")[:-1]
    assert table(instructions)["kind"].tolist() == [8]
    blocked = table(instructions)
    blocked["kind"], blocked["amount"] = 8, -1
    made = Traffic(np.zeros(0, ACCESS), np.zeros(0, np.int64), np.array([(0, -1)], STEP), np.array([0, 1]), [])
    with pytest.raises(RuntimeError, match="wait for each other"):
        sm.simulate(model._shares(H200, SMS, 1, 1, 0), blocked, made, [], 1, 1)


def test_tensor_cores_take_their_cycles() -> None:
    """64x64x16 by a warpgroup: 32 cycles on an H200, 4096 FLOP per cycle and SM."""
    result = run("HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0", repeat=100, warps=4)
    (mma,) = code("HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0")[:-1]
    assert flops(mma) * 4 == 2 * 64 * 64 * 16
    assert result["tensor"] == 100 * 32
    assert 400 * flops(mma) / result["tensor"] == 4096


@pytest.mark.parametrize(("arch", "per_cycle"), [(80, 2048), (89, 512)])
def test_rate_of_mma(arch: int, per_cycle: int) -> None:
    """GeForce cards accumulate in float32 at half rate."""
    (mma,) = code("HMMA.16816.F32 R4, R8, R12, R4")[:-1]
    assert 4 * flops(mma) / MACHINES[arch].mma == per_cycle


def test_a_higher_clock_leaves_the_dram_alone() -> None:
    fast = at_clock(H200, 2e9)
    assert (fast.clock, fast.memory) == (2e9, H200.memory)
    assert at_clock(H200, None) is H200


def test_uniform_instructions_have_no_pipe() -> None:
    assert class_of(code("UIADD3 UR4, UR4, 0x1, URZ")[0])[0] == 0


def test_without_a_compiler_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(sm, "FOLDER", tmp_path)
    monkeypatch.setattr(sm, "compiler", lambda: None)
    sm.library.cache_clear()
    with pytest.raises(sm.NoCompiler, match="install g\\+\\+ or clang\\+\\+"):
        sm.library()
    sm.library.cache_clear()
