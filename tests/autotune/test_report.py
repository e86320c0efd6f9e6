"""The report of a run, its plot, the summary."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

import pytest

from autotune.commands import report, run
from autotune.items.results import Failure
from autotune.search import tuning
from autotune.search.tuning import ModelTiming, Outcome
from tests.autotune.simulated import CALM, FACTS, ITEMS, TARGET, SimulatedDevice, candidates_of


@pytest.fixture
def outcome(file: Path, monkeypatch: pytest.MonkeyPatch) -> Outcome:
    """The outcome of a run whose budget was too small to try everything."""
    monkeypatch.setattr(tuning, "candidates", lambda item, gpu, incumbent: candidates_of(item.key))
    return tuning.tune([TARGET], ITEMS, SimulatedDevice(1, CALM), file, budget=20)


def test_the_plot_is_optional(outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert [path.name for path in report.write(tmp_path, outcome, FACTS)] == ["report.md", "report.json"]
    assert "png" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("what", ["everything", "a model that failed", "nothing"])
def test_the_plot(what: str, outcome: Outcome, tmp_path: Path) -> None:
    """Also of failed models and without any data."""
    pytest.importorskip("matplotlib")
    if what == "a model that failed":
        outcome.models = [ModelTiming(TARGET, math.nan, math.nan, 0, Failure("crash", "signal 9"))]
    elif what == "nothing":
        outcome.models, outcome.races = [], []
    path = tmp_path / "report.png"
    assert report.plot(path, outcome, "NVIDIA H200")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_medians_and_percentiles(outcome: Outcome) -> None:
    text = report.markdown(outcome, FACTS)
    race = next(race for race in outcome.races if race.samples)
    times = race.samples[race.champion.key]
    row = next(line for line in text.splitlines() if line.startswith(f"| {race.item.key} |"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[4] == f"{median(times):.2f}"
    low, high = (float(v) for v in cells[5].split(" to "))
    assert min(times) <= low < median(times) < high <= max(times)
    idle = [race for race in outcome.races if not race.samples]
    assert all(f"| {race.item.key} | {race.item.calls} | - | - | - |" in text for race in idle)


def test_programmatic_dependent_launch_is_reported(outcome: Outcome, file: Path) -> None:
    outcome.pdl, outcome.pdl_models = True, [ModelTiming(TARGET, 100.0, 80.0, 1)]
    text = report.markdown(outcome, FACTS)
    assert "Programmatic dependent launch is on" in text
    assert f"| {TARGET.name} | 100.0 | 80.0 | 25.0% |" in text
    assert "programmatic dependent launch is on" in run.summary(outcome, file)
    found = report.to_json(outcome, FACTS)
    assert found["programmatic_dependent_launch"] is True
    assert [one["after_us"] for one in found["models_pdl_changed"]] == [80.0]


def test_the_summary_warns_of_a_disturbed_gpu(outcome: Outcome, file: Path) -> None:
    assert not any("disturbed" in line for line in run.summary(outcome, file))
    outcome.counts["still disturbed"] = outcome.counts["samples"] // 2
    assert any("on a quiet GPU" in line for line in run.summary(outcome, file))
