"""Runs over many files: failures reported per file, no input overwritten, no partial result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.files.runs import Failing, fill, run, save, three, written
from tests.runtime.sample_images import FakeModel, sample_image
from tinysr_kernels.errors import NonFiniteOutput
from tinysr_kernels.files import batch
from tinysr_kernels.files.batch import Settings
from tinysr_kernels.files.encode import Encoding
from tinysr_kernels.files.jobs import Job, plan_jobs
from tinysr_kernels.files.picture_io import read_image, write_image
from tinysr_kernels.runtime.images.metadata import Metadata


def test_a_folder_with_every_type_of_file(tmp_path):
    expected = fill(tmp_path / "in")
    with open(tmp_path / "report.jsonl", "w", encoding="utf-8") as report:
        jobs = plan_jobs([tmp_path / "in"], tmp_path / "out")
        results = batch.run(jobs, FakeModel(), report=report)
    lines = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [line["input"] for line in lines] == [result.input for result in results]
    for line in lines:
        source = Path(line["input"])
        wanted = expected.pop(source.name)
        if wanted is None:
            assert line["status"] == "failed"
            assert line["output"] is None
            assert str(source) in line["error"]["message"]
            assert line["error"]["type"] == "InputError"
            continue
        mode, size = wanted
        assert line["status"] == "done", line
        assert tuple(line["output_size"]) == size
        read = read_image(line["output"])
        assert (read.mode, read.size) == (mode, size)
        assert line["seconds"] >= 0
    assert expected == {}
    assert len(written(tmp_path / "out")) == sum(line["status"] == "done" for line in lines)
    assert jobs.ignored == {"hidden": 1, "not images or films": 2, "subfolders, without --recursive": 1}
    notices = {Path(line["input"]).name: line["notices"] for line in lines}
    assert notices["cmyk.jpg"] == ["CMYK was converted to RGB"]
    assert notices["white.png"] == []


def test_results_that_do_not_fit_the_format_become_png(tmp_path):
    save(tmp_path / "in" / "alpha.webp", sample_image("RGBA", 5, 4), lossless=True)
    save(tmp_path / "in" / "alpha.png", sample_image("LA", 5, 4))
    save(tmp_path / "in" / "long.png", Image.new("L", (4100, 1)))
    results = run([tmp_path / "in"], tmp_path / "out", suffix=".jpg")
    assert [Path(result.output).name for result in results] == ["alpha_png.png", "alpha_webp.png", "long.jpg"]
    assert results[0].notices == ["JPEG does not support transparency: written as alpha_png.png"]
    (result,) = run([tmp_path / "in" / "long.png"], tmp_path / "long.webp")
    assert result.output == str(tmp_path / "long.png")
    assert "16383" in result.notices[0]
    # The fallback counts as an existing result too.
    again = run([tmp_path / "in"], tmp_path / "out", Settings(skip_existing=True), suffix=".jpg")
    assert {result.status for result in again} == {"skipped"}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (NonFiniteOutput("NaN in every precision"), "NaN in every precision"),
        (ValueError("surprise"), "unexpected ValueError: surprise"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "does not fit into host memory"),
    ],
)
def test_one_failure_never_stops_the_others(tmp_path, error, message):
    results = run([three(tmp_path / "in")], tmp_path / "out", model=Failing(error))
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert results[1].error["type"] == ("OutOfMemory" if isinstance(error, MemoryError) else type(error).__name__)
    assert message in results[1].error["message"]
    assert str(tmp_path / "in" / "b.png") in results[1].error["message"]
    assert written(tmp_path / "out") == ["a.png", "c.png"]


def test_strict_stops_at_the_first_failure(tmp_path):
    results = run([three(tmp_path / "in")], tmp_path / "out", Settings(strict=True), Failing(ValueError("x")))
    assert [result.status for result in results] == ["done", "failed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_discards_the_current_file_and_flushes_the_report(tmp_path, error):
    jobs = plan_jobs([three(tmp_path / "in")], tmp_path / "out")
    report = tmp_path / "report.jsonl"
    with open(report, "w", encoding="utf-8") as stream, pytest.raises(type(error)):
        batch.run(jobs, Failing(error), report=stream)
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["done", "interrupted"]
    assert written(tmp_path / "out") == ["a.png"]
    results = run([tmp_path / "in"], tmp_path / "out", Settings(skip_existing=True))
    assert [result.status for result in results] == ["skipped", "done", "done"]


def test_a_folder_that_cannot_be_written_is_an_error_of_each_file(tmp_path):
    source = save(tmp_path / "in" / "a.png")
    (tmp_path / "out").write_text("a file with the name of the folder")
    jobs = [Job(source, Path("a.png"), tmp_path / "out" / "a.png", tmp_path / "out" / "a.png")]
    (result,) = batch.run(jobs, FakeModel())
    assert result.status == "failed"
    assert result.error["type"] in ("FileExistsError", "NotADirectoryError")


def test_frames_limits_and_encoding_reach_the_files(tmp_path):
    save(tmp_path / "a.gif", sample_image("P", 5, 5), save_all=True, append_images=[sample_image("P", 5, 5, seed=1)])
    (result,) = run([tmp_path / "a.gif"], tmp_path / "a.png", Settings(frame=1))
    assert result.status == "done"
    (result,) = run([tmp_path / "a.gif"], tmp_path / "a.png", Settings(frame=1, max_pixels=24))
    assert "the limit is 24" in result.error["message"]
    source = tmp_path / "b.png"
    write_image(source, np.zeros((3, 3, 3), np.uint8), Metadata(xmp=b"<x/>"))
    (result,) = run([source], tmp_path / "c.png", Settings(encoding=Encoding(strip=True)))
    assert read_image(result.output).metadata.xmp is None


def test_the_report_is_plain_json_whatever_the_names(tmp_path):
    source = save(tmp_path / 'ünter "x"\n.png')
    (result,) = run([source], tmp_path / "out")
    assert json.loads(result.as_json())["input"] == str(source)
    assert "\n" not in result.as_json()
