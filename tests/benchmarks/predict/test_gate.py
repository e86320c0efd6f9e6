"""The gate: what is worse than its bar is said, better figures lower the bars, only a person raises them."""

from __future__ import annotations

import pytest

from benchmarks.predict import gate
from benchmarks.predict.cycles.machines import MACHINES
from benchmarks.predict.launches import Planned, Program
from benchmarks.predict.model import Prediction
from benchmarks.predict.networks import NetworkPrediction, PredictedLaunch
from benchmarks.static.machine_code import Variant
from tinysr_kernels.launch.json_file import BadFile
from tinysr_kernels.ops.trace import Step

FAST = Prediction(4.0, {"l2": 3.5}, "l2", 64, 0, 0, 2, 100.0, 1.0, 1.0, 0.0, 0.0, 0, 0)


def launch(us: float, grid: int = 132, floor: float = 2.0, **figures: float) -> PredictedLaunch:
    variant = Variant(90, "module", "kernel", (), (), (), 4, 1)
    planned = Planned(0, "op", "part", Step("kernel", (), ()), (1,), {}, Program(variant, (grid, 1, 1), ()), False, 0)
    return PredictedLaunch(planned, floor, Prediction(**{**vars(FAST), "us": us, **figures}))


def network(*launches: PredictedLaunch) -> NetworkPrediction:
    return NetworkPrediction("family", "variant", MACHINES[90], launches)


def test_totals_count_gaps_and_limits() -> None:
    foreign = PredictedLaunch(launch(1.0).planned, 1.0, None)
    made = network(launch(6.0), launch(4.0, ipc=2.0), foreign).summary()
    totals = made["totals"]
    assert (totals["launches"], totals["floor_us"], totals["predicted_us"]) == (3, 5.0, 12.0)
    assert totals["with_gaps_us"] == 15.0
    assert totals["limits"] == {"l2": 0.83, "estimate": 0.17}
    assert totals["ipc"] == [1.0, 2.0]
    assert list(made["parts"]) == ["part"]
    assert list(made["kinds"]) == ["op: kernel"]


def test_the_json_has_what_is_promised() -> None:
    made = network(launch(6.0)).to_json()
    assert {"family", "variant", "gpu", "clock_ghz", "floor_us", "predicted_us", "launches"} <= set(made)
    promised = {"op", "kernel", "grid", "config", "floor_us", "predicted_us", "limit", "bounds_us", "registers"}
    assert promised | {"programs_per_sm"} <= set(made["launches"][0])


@pytest.mark.parametrize(
    ("one", "rules"),
    [
        (launch(6.0), []),
        (launch(21.0), ["above 10x its floor"]),
        (launch(4.9, floor=0.1), []),
        (launch(6.0, grid=65), ["grid below half the SMs"]),
        (launch(6.0, grid=66), []),
        (launch(6.0, conflicts=4.5), ["bank conflicts above 4-way"]),
        (launch(6.0, narrow_share=0.6), ["most bytes in units of 1 or 2"]),
        (launch(1.0, spilled=4), ["spills"]),
    ],
)
def test_rules_for_fast_code(one: PredictedLaunch, rules: list[str]) -> None:
    assert one.faults(132) == rules


def test_a_slower_launch_is_seen() -> None:
    bars = gate.bars_of([network(launch(10.0), launch(90.0))])
    assert gate.violations(bars, bars) == []
    within = gate.bars_of([network(launch(10.0), launch(91.0))])
    assert gate.violations(within, bars) == []
    slower = gate.bars_of([network(launch(10.0), launch(95.0))])
    found = gate.violations(slower, bars)
    assert len(found) == 2
    assert "total: 107 us predicted, the bar is 102" in found[0]


def test_one_more_launch_that_breaks_a_rule_is_seen() -> None:
    bars = gate.bars_of([network(launch(6.0, grid=8), launch(6.0))])
    found = gate.violations(gate.bars_of([network(launch(6.0, grid=8), launch(6.0, grid=8))]), bars)
    assert found == ["family variant, H200, rule grid below half the SMs: 2 launches, the bar is 1"]
    spills = gate.bars_of([network(launch(6.0, grid=8), launch(6.0, spilled=8))])
    assert gate.violations(spills, bars) == ["family variant, H200, rule spills: 1 launches, the bar is 0"]


def test_a_network_without_bars_is_seen() -> None:
    assert "has no bars" in gate.violations(gate.bars_of([network(launch(1.0))]), {})[0]


def test_bars_sink_and_do_not_rise() -> None:
    bars = gate.bars_of([network(launch(10.0))])
    better, worse = gate.bars_of([network(launch(8.0))]), gate.bars_of([network(launch(12.0, spilled=4))])
    assert gate.lowered(better, bars) == better
    assert gate.lowered(worse, bars)["family variant, H200"] == {**bars["family variant, H200"], "rule spills": 0.0}
    assert gate.lowered(better, {"another": {"total": 1.0}})["another"] == {"total": 1.0}


def test_bars_are_kept_in_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    bars = gate.bars_of([network(launch(10.0))])
    gate.write(bars, tmp_path / "bars.json")
    assert gate.read(tmp_path / "bars.json") == bars
    assert gate.read(tmp_path / "none.json") == {}
    (tmp_path / "bars.json").write_text("[]")
    with pytest.raises(BadFile, match="holds no bars"):
        gate.read(tmp_path / "bars.json")
