"""The stored predictions, the page made from them, and the command."""

from __future__ import annotations

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import predict as command
from benchmarks.predict import gate, launches, page, store
from benchmarks.predict.cycles.machines import MACHINES
from benchmarks.predict.launches import Planned, Program
from benchmarks.predict.model import Prediction
from benchmarks.static.machine_code import Variant
from tinysr_kernels.ops.trace import Step

ONE = Prediction(4.0, {"l2": 3.5}, "l2", 64, 0, 0, 2, 100.0, 1.0, 1.0, 0.0, 0.0, 0, 0)


def test_predictions_are_kept_in_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "predicted.json"
    store.write({"key": ONE}, path)
    assert store.read(path) == {"key": ONE}
    assert store.read(tmp_path / "none.json") == {}


@pytest.mark.parametrize("text", ["[]", '{"key": {}}', "{"])
def test_a_file_of_another_form_is_not_used(text: str, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "predicted.json"
    path.write_text(text)
    assert store.read(path) == {}
    assert "nothing of it is used" in capsys.readouterr().err


def test_the_page_is_generated_from_the_results() -> None:
    networks = page.read()
    assert page.PAGE.read_text(encoding="utf-8") == page.text(networks), "stale: python -m benchmarks predict --keep"
    assert page.PICTURE.exists()
    found = {(one["family"], one["variant"]) for one in networks if one["gpu"] == page.IN_DETAIL}
    assert found == set(command.PREDICTED)


def test_the_page_marks_its_figures() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert "Every figure here is predicted or computed" in text
    assert "nothing measured" not in text.lower().split("## totals")[1]


def test_nothing_stored_is_above_its_bar() -> None:
    bars = gate.read()
    for one in page.read():
        held = bars[f"{one['family']} {one['variant']}, {one['gpu']}"]
        assert one["totals"]["with_gaps_us"] <= held["total"] * (1 + gate.SLACK) + gate.SLACK_US


def test_nothing_is_predicted_below_its_floor() -> None:
    """Of whole networks: a launch may have a lower floor at the model's rates than at the peaks that others reached."""
    for one in page.read():
        assert one["totals"]["predicted_us"] >= one["totals"]["floor_us"]


@pytest.fixture
def one_launch(monkeypatch: pytest.MonkeyPatch, tmp_path):  # type: ignore[no-untyped-def]
    """A network of one launch, and results of its own; the fixture's value sets the predicted time."""
    variant = Variant(90, "tinysr_kernels.ops.norm.kernels.norm", "kernel", (), (), (), 4, 1)
    monkeypatch.setattr(Variant, "digest", "digest")
    step = Step("kernel", (), (), 10**9)
    planned = Planned(0, "op", "part", step, (1,), {"rows": 8}, Program(variant, (132, 1, 1), ()), False, 0)
    monkeypatch.setattr(launches, "network_launches", lambda *_: [planned])
    monkeypatch.setattr(store, "triton_version", lambda: "3")
    time = {"us": 4.0, "error": ""}

    def predict_all(jobs, stored, workers, keep):  # type: ignore[no-untyped-def]
        return {job.key: time["error"] or Prediction(**{**vars(ONE), "us": time["us"]}) for job in jobs}

    monkeypatch.setattr(store, "predict_all", predict_all)
    monkeypatch.setattr(gate, "read", lambda: bars)
    bars = {"tinysr-dit separable, H200": {"total": 5.0, "kind op: kernel": 5.0}}
    return time


ARGUMENTS = ["predict", "--gpu", "H200", "--variant", "separable"]


def test_the_command(one_launch, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "predicted.json"
    assert main([*ARGUMENTS, "--json", str(path), "--launches", "--check"]) == 0
    made = json.loads(path.read_text())
    assert (made["family"], made["variant"], made["gpu"], made["clock_ghz"]) == (
        "tinysr-dit",
        "separable",
        "H200",
        1.755,
    )
    assert made["predicted_us"] == 4.0
    assert made["launches"][0]["config"] == {"rows": 8}
    out = capsys.readouterr().out
    assert "predicted" in out
    assert "64 registers" in out


def test_the_command_fails_above_a_bar(one_launch, capsys) -> None:  # type: ignore[no-untyped-def]
    one_launch["us"] = 9.0
    assert main(ARGUMENTS) == 0
    assert main([*ARGUMENTS, "--check"]) == 1
    assert "total: 10 us predicted, the bar is 5" in capsys.readouterr().err


def test_the_command_fails_for_what_cannot_be_predicted(one_launch, capsys) -> None:  # type: ignore[no-untyped-def]
    one_launch["error"] = "UnknownCode: FROBNICATE"
    assert main(ARGUMENTS) == 1
    assert "op, kernel is not predicted: UnknownCode: FROBNICATE" in capsys.readouterr().err


def test_another_clock_is_not_kept(one_launch, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main([*ARGUMENTS, "--clock", "1.98", "--keep"]) == 2
    assert "at another clock" in capsys.readouterr().err


def test_every_machine_stands_for_its_architecture() -> None:
    assert {machine.arch: arch for arch, machine in MACHINES.items()} == {arch: arch for arch in MACHINES}
    assert set(command.GPU_NAMES.values()) == set(MACHINES)
