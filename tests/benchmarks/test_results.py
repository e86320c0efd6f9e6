"""Result files: validation, resuming, percentiles."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.measure.results import PLACES, Record, Sink, percentiles, read, validate
from benchmarks.static.static import RESULTS
from tests import ROOT
from tinysr_kernels.launch.json_file import BadFile

FOLDER = ROOT / "benchmarks" / "results"


def sink(path: Path | None = None, command: str = "micro") -> Sink:
    return Sink(command, "CPU", True, path)


def content(**changes: Any) -> dict[str, Any]:
    made = sink()
    made.add(Record("a", {"op": "x"}, [1.0, 2.0], ["", ""], {"p50_us": 1.5}))
    return dataclasses.asdict(made.results) | changes


def record(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: content(records=[content()["records"][0] | changes])


def test_round_trip(tmp_path: Path) -> None:
    made = sink(tmp_path / "deep" / "r.json")
    made.add(Record("a", {"op": "x"}, [1.0, 2.0], ["", "thermal slowdown"], {"p50_us": 1.0}))
    made.finish()
    assert read(tmp_path / "deep" / "r.json") == made.results
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: content(schema=2), "schema must be 1, found 2"),
        (lambda: content(complete=1), "complete must be bool"),
        (lambda: {k: v for k, v in content().items() if k != "device"}, "file must have"),
        (lambda: content(environment={"torch": 2}), r"environment\[torch\] must be str"),
        (lambda: content(records={}), "records must be a list"),
        (record(samples_us=[1.0, 0.0]), "samples_us must be above 0"),
        (record(samples_us=["1", 2.0]), r"samples_us\[0\] must be float"),
        (record(disturbed=[""]), "as long as samples_us"),
        (record(values={"p50_us": float("nan")}), "must be finite"),
        (record(samples_us=[], disturbed=[], values={}), "neither samples, nor values, nor an error"),
        (record(readings=[{"when": "before"}]), r"readings\[0\] must have"),
        (lambda: content(records=content()["records"] * 2), "'a' occurs 2 times"),
    ],
)
def test_invalid_content(made: Callable[[], dict[str, Any]], message: str) -> None:
    validate(content())
    with pytest.raises(ValueError, match=message):
        validate(made())


def test_an_interrupted_run_resumes(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    first = sink(path)
    first.add(Record("a", {}, values={"x": 1.0}))
    first.add(Record("b", {}, error="broken"))
    second = sink(path)
    assert second.has("a")
    assert not second.has("b")
    assert second.results.started == first.results.started
    second.finish()
    assert not sink(path).has("a")  # the earlier run was complete: this is a new one
    assert not sink(path, command="e2e").has("a")


def test_errors_name_the_corrupt_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"r\.json: is not JSON"):
        read(path)
    path.write_text(json.dumps({"schema": 1}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"r\.json: file must have"):
        read(path)


@pytest.mark.parametrize("text", ["", "[]", "[" * 5000, '{"schema": 1, "schema": 1}', "\ufeff{}", "NaN"])
def test_damaged_files_are_named_and_the_others_reported(tmp_path: Path, capsys, text: str) -> None:
    sink(tmp_path / "micro.json").add(Record("a", {"op": "x"}, values={"p50_us": 1.0}))
    (tmp_path / "e2e.json").write_text('{"schema": 1, ' + text if text else '{"schema"', encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    assert main(["report", str(tmp_path)]) == 0
    err = capsys.readouterr().err
    assert re.search(r"ignored: 'e2e.json': .*; delete it and measure again", err)
    assert "ignored: 'folder.json': is no regular file" in err
    assert "## micro" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", ["ceilings", "correctness", "e2e", "micro", "quality", "cpu", "soak"])
def test_records_that_lack_what_a_section_shows(tmp_path: Path, command: str) -> None:
    """Of the right form, so they are read; the report says what they lack, and the plots are left out."""
    made = sink(tmp_path / f"{command}.json", command)
    made.add(Record("x: speedup", {"peer": "ours", "interval": "device", "batch": "1"}, [1.0], values={"p50_us": 0.0}))
    assert main(["report", str(tmp_path)]) == 0
    assert f"## {command}" in (tmp_path / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [1e308 * 10, 10**400, -1e31])
def test_absurd_numbers_are_refused(tmp_path: Path, number: float) -> None:
    text = json.dumps(content()).replace("1.5", str(number).replace("inf", "1e999"))
    (tmp_path / "r.json").write_text(text, encoding="utf-8")
    with pytest.raises(BadFile, match=r"must be finite, and less than 1e\+30|Exceeds the limit"):
        read(tmp_path / "r.json")


def test_a_command_names_the_file_that_it_cannot_resume(tmp_path: Path, capsys) -> None:
    (tmp_path / "cpu.json").write_text("{", encoding="utf-8")
    assert main(["cpu", "--json", str(tmp_path / "cpu.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "cpu.json").read_text() == "{"


def test_disturbed_samples_are_ignored_if_enough_are_clean() -> None:
    assert percentiles([1.0, 2.0, 3.0, 90.0], ["", "", "", "slow"]) == {
        "p50_us": 2.0,
        "p20_us": pytest.approx(1.4),
        "p80_us": pytest.approx(2.6),
        "disturbed": 1.0,
    }
    assert percentiles([1.0, 90.0, 91.0], ["", "slow", "slow"])["p50_us"] == 90.0


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.name)
def test_the_committed_results_are_valid(path: Path) -> None:
    """Except those of plans, predictions and static checks, which have their own format and no timings."""
    if not path.name.startswith(("plan-", "predicted-", "static-")):
        assert read(path).records


def test_the_documentation_of_fp8_agrees_with_the_result() -> None:
    """Also within the bounds: 45 dB PSNR to the output without fp8, at most 0.05 dB lower PSNR to the original."""
    found = read(RESULTS / "quality-small-cpu.json")
    text = (RESULTS.parents[1] / "docs" / "fp8.md").read_text(encoding="utf-8")
    base, fp8 = found.find("float32 reference"), found.find("float32 reference fp8")
    assert base is not None
    assert fp8 is not None
    assert fp8.values["psnr_to_float32"] >= 45
    assert base.values["psnr"] - fp8.values["psnr"] <= 0.05
    for name, one in (("float32", base), ("**float32, fp8**", fp8)):
        assert f"| {name} | {one.values['psnr']:.4f} | {one.values['ssim']:.5f} |" in text
    assert f"{fp8.values['psnr_to_float32']:.1f} |" in text
    assert not set(PLACES) & set(found.environment)
