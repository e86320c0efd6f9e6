"""The machine code of a hot kernel of each operation, ahead of time, as `python -m benchmarks static` reports it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import static
from benchmarks.__main__ import main
from benchmarks.calls import CALLS

pytest.importorskip("triton.backends.nvidia", reason="the compiler's own tools are needed")

FIELDS = (
    "op config arch triton registers spill_bytes shared_bytes shared_limit tensor_core wide_loads wide_stores seconds"
)


@pytest.mark.parametrize("op", sorted(CALLS))
def test_hot_call_is_clean(op: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """The first call of the list, in half precision, on two architectures."""
    first = [next(CALLS[op](static.DTYPES["float16"]))]
    monkeypatch.setitem(CALLS, op, lambda dtype: iter(first))
    file = tmp_path / "static.json"
    arguments = ["static", "--op", op, "--arch", "80", "--arch", "90", "--dtype", "float16", "--json", str(file)]
    assert main(arguments) == 0, capsys.readouterr()
    reports = json.loads(file.read_text(encoding="utf-8"))
    assert {report["arch"] for report in reports} == {80, 90}
    for report in reports:
        assert list(report) == FIELDS.split()
        assert report["op"] == op
        assert 16 <= report["registers"] <= 255
        assert report["spill_bytes"] == 0
        assert report["shared_bytes"] <= report["shared_limit"]
        assert report["seconds"] > 0
    assert any(report["wide_loads"] for report in reports)
    assert any(report["wide_stores"] for report in reports)
    assert all(report["tensor_core"] for report in reports) == (op in ("sepconv", "linear"))


def report(**changes: object) -> static.Report:
    clean = static.Report("op", "config", 90, "3.7.1", 128, 0, 1024, 2048, True, 1, 1, 1.0)
    return dataclasses.replace(clean, **changes)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 4096}, "needs 4096 bytes of shared memory of 2048"),
        ({"registers": None}, "does not compile"),
    ],
)
def test_faults_fail_the_command(changes: dict, fault: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    bad = report(**changes)
    assert bad.faults == [fault]
    assert report().faults == []
    monkeypatch.setattr(static, "variants", lambda *_: [])
    monkeypatch.setattr(static, "compile_all", lambda *_: [(report(), ""), (bad, "because")])
    assert main(["static"]) == 1
    assert fault in capsys.readouterr().err
    monkeypatch.setattr(static, "compile_all", lambda *_: [(report(), "")])
    assert main(["static"]) == 0
