"""The report: appended, recognized, never a file that is something else, never in the way of the work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import tinysr_kernels
from tests.cli.command import upscale
from tests.files.runs import save, written
from tinysr_kernels.cli import report as module

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX files")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def kinds(path: Path) -> list[str]:
    return [next(iter(line)) for line in lines(path)]


def test_runs_are_appended_with_a_line_before_and_after(compiled, folder):
    report = folder / "report.jsonl"
    arguments = (folder / "in" / "a.png", "-o", folder / "out", "--skip-existing", "--report", report)
    assert upscale(*arguments) == 0
    first = report.read_bytes()
    assert upscale(*arguments) == 0
    assert report.read_bytes().startswith(first)
    assert kinds(report) == ["run", "input", "summary"] * 2
    begin, _, end, _, second, summary = lines(report)
    assert begin["run"]["version"] == tinysr_kernels.__version__
    assert begin["run"]["arguments"] == ["upscale", "--model", "demo", *map(str, arguments)]
    assert begin["run"]["started"].endswith("+00:00")
    assert end == {"summary": {"done": 1, "ignored": {}}}
    assert second["status"] == "skipped"
    assert summary == {"summary": {"skipped": 1, "ignored": {}}}


@pytest.mark.parametrize("old", [b"", b'{"input": "a.png", "status": "done"}\n', b'{"run": {}}\n{"input": "torn'])
def test_empty_files_and_reports_are_appended_to(compiled, folder, old):
    report = folder / "report.jsonl"
    report.write_bytes(old)
    assert upscale(folder / "in" / "a.png", "-o", folder / "out", "--report", report) == 0
    after = report.read_bytes()
    assert after.startswith(old)
    assert after[len(old) :].lstrip(b"\n").startswith(b'{"run": ')


FOREIGN = [b"remember the milk\n", b"\x89PNG\r\n\x1a\n", b"[]\n", b'{"weights": 1}\n', b"\n", b"[" * 100_000, b"\0" * 9]


@pytest.mark.parametrize("data", FOREIGN)
def test_any_other_file_is_refused_and_kept(compiled, folder, capsys, data):
    path = folder / "something"
    path.write_bytes(data)
    assert upscale(folder / "in" / "a.png", "-o", folder / "out", "--report", path) == 2
    assert path.read_bytes() == data
    assert not (folder / "out").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_checkpoint_an_input_or_a_result_is_no_report(compiled, folder, monkeypatch):
    checkpoint = folder / "model.safetensors"
    checkpoint.write_bytes(b"\x10\0\0\0\0\0\0\0{}" + b" " * 14)
    before = checkpoint.read_bytes()
    source = folder / "in" / "a.png"
    assert upscale(source, "-o", folder / "out", "--report", checkpoint) == 2
    assert checkpoint.read_bytes() == before
    monkeypatch.chdir(folder)
    (folder / "empty").write_bytes(b"")
    assert upscale("empty", source, "-o", "out", "--report", "./new/../empty") == 2
    for report in ("out/a.png", "out.mp4", "no/such/folder", ".", "", "a\0b"):
        assert upscale(source, "-o", "out", "--report", report) == 2
    assert sorted(os.listdir(folder)) == ["empty", "in", "model.safetensors"]


@posix
def test_special_files(compiled, folder, capsys):
    os.mkfifo(folder / "fifo")
    source = folder / "in" / "a.png"
    assert upscale(source, "-o", folder / "out", "--report", folder / "fifo") == 2
    assert upscale(source, "-o", folder / "out", "--report", "/dev/null") == 0
    capsys.readouterr()
    assert upscale(source, "-o", folder / "out", "--report", "-") == 0
    assert [next(iter(json.loads(line))) for line in capsys.readouterr().out.splitlines()] == [
        "run",
        "input",
        "summary",
    ]


def test_a_full_disk_under_the_report_is_said_once_and_the_work_goes_on(
    compiled,
    folder,
    capsys,
    monkeypatch,
):
    def full(_descriptor, _data):
        raise OSError(28, "No space left on device")

    for name in "xyz":
        save(folder / "in" / f"{name}.png")
    (folder / "in" / "text.png").unlink()
    monkeypatch.setattr(module.os, "write", full)
    report = module.Report(str(folder / "report.jsonl"))
    report.begin([], "demo")
    report.write("{}\n")
    report.close()
    monkeypatch.undo()
    text = capsys.readouterr().err
    assert text.count("is incomplete, the run goes on: No space left on device") == 1


@posix
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_report_on_a_full_device(compiled, folder, capsys):
    (folder / "in" / "text.png").unlink()
    assert upscale(folder / "in", "-o", folder / "out", "--report", "/dev/full") == 0
    assert written(folder / "out") == ["a.png", "b.jpg"]
    assert capsys.readouterr().err.count("the report") == 1


@posix
def test_names_that_are_not_utf8_reach_the_report(compiled, folder, capsys):
    name = os.fsdecode(b"caf\xe9\x1b[31m.png")
    try:
        os.rename(folder / "in" / "a.png", folder / "in" / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (folder / "in" / "text.png").unlink()
    report = folder / "report.jsonl"
    assert upscale(folder / "in", "-o", folder / "out", "--report", report) == 0
    assert name in [Path(line["output"]).name for line in lines(report) if "input" in line]
    assert "caf\\udce9\\x1b[31m.png" in capsys.readouterr().out
