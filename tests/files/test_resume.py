"""Second runs: what is there is skipped and counted, only for the input that made it, and never enlarged again."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from tests.files.runs import Failing, contents, fill, run, save, three, written
from tests.runtime.sample_images import FakeModel, sample_image
from tinysr_kernels.files import batch
from tinysr_kernels.files.batch import Settings
from tinysr_kernels.files.encode import Encoding
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.files.plan.records import FILE_NAME

RESUME = Settings(skip_existing=True)
FOLDERS = ("in", "out")


def statuses(results) -> list[str]:
    return [result.status for result in results]


def test_a_second_run_skips_existing_results(tmp_path):
    fill(tmp_path / "in")
    model = FakeModel()
    first = run([tmp_path / "in"], tmp_path / "out", model=model)
    calls = model.calls
    done = [result for result in first if result.status == "done"]
    Path(done[0].output).unlink()
    second = run([tmp_path / "in"], tmp_path / "out", RESUME, model)
    assert model.calls == calls + 1
    assert sum(result.status == "skipped" for result in second) == len(done) - 1
    assert sum(result.status == "failed" for result in second) == len(first) - len(done)
    assert [result.notices for result in second if result.status == "skipped"] == [[]] * (len(done) - 1)


def test_the_fallback_of_another_input_does_not_count(tmp_path):
    """logo.jpg's PNG is no result of logo.png, which is given later."""
    save(tmp_path / "in" / "logo.webp", sample_image("RGBA", 3, 3), lossless=True)
    (first,) = run([tmp_path / "in"], tmp_path / "out", suffix=".jpg")
    assert first.output == str(tmp_path / "out" / "logo.png")
    (tmp_path / "in" / "logo.webp").rename(tmp_path / "logo.webp")
    save(tmp_path / "in" / "logo.png")
    (second,) = run([tmp_path / "in"], tmp_path / "out", RESUME)
    assert second.status == "done"
    # For the input that made it, it counts, wherever that lies now.
    (third,) = run([tmp_path / "logo.webp"], tmp_path / "other", RESUME, suffix=".jpg")
    assert third.status == "done"
    (fourth,) = run([tmp_path / "logo.webp"], tmp_path / "other", RESUME, suffix=".jpg")
    assert (fourth.status, fourth.output) == ("skipped", str(tmp_path / "other" / "logo.png"))


@pytest.mark.parametrize("strip", [False, True])
def test_another_input_of_the_same_name_does_not_count(tmp_path, strip):
    settings = Settings(skip_existing=True, encoding=Encoding(strip=strip))
    for folder, seed in (("one", 1), ("two", 2)):
        save(tmp_path / folder / "a.png", sample_image("RGB", 3, 3, seed=seed))
    assert statuses(run([tmp_path / "one"], tmp_path / "out", settings)) == ["done"]
    before = contents(tmp_path / "out")
    assert statuses(run([tmp_path / "one"], tmp_path / "out", settings)) == ["skipped"]
    assert contents(tmp_path / "out") == before
    assert statuses(run([tmp_path / "two"], tmp_path / "out", settings)) == ["done"]
    assert contents(tmp_path / "out") != before


def test_an_edited_input_is_enlarged_again(tmp_path):
    source = save(tmp_path / "in" / "a.png")
    run([source], tmp_path / "out")
    save(source, sample_image("RGB", 5, 5))
    assert statuses(run([source], tmp_path / "out", RESUME)) == ["done"]


def test_results_count_after_both_folders_were_moved_or_copied(tmp_path):
    three(tmp_path / "in")
    run([tmp_path / "in"], tmp_path / "out")
    for number, move in enumerate((shutil.copytree, os.rename)):
        (tmp_path / str(number)).mkdir()
        moved = [tmp_path / str(number) / name for name in FOLDERS]
        for folder in moved:
            move(tmp_path / folder.name, folder)
        for path in [path for folder in moved for path in folder.iterdir()]:
            os.utime(path, ns=(1, 1))
        assert statuses(run(moved[:1], moved[1], RESUME)) == ["skipped"] * 3


def test_a_result_without_a_record_is_kept_and_said(tmp_path):
    three(tmp_path / "in")
    run([tmp_path / "in"], tmp_path / "out")
    (tmp_path / "out" / FILE_NAME).unlink()
    before = contents(tmp_path / "out")
    results = run([tmp_path / "in"], tmp_path / "out", RESUME)
    assert statuses(results) == ["skipped"] * 3
    assert results[0].notices == ["a.png is there, but nothing says that it was made from this input"]
    assert contents(tmp_path / "out") == before
    # An output that the user named needs no record.
    run([tmp_path / "in" / "a.png"], tmp_path / "big.png")
    (named,) = run([tmp_path / "in" / "a.png"], tmp_path / "big.png", RESUME)
    assert (named.status, named.notices) == ("skipped", [])
    assert not (tmp_path / FILE_NAME).exists()


@pytest.mark.parametrize("settings", [Settings(), RESUME])
@pytest.mark.parametrize("glob", [False, True])
def test_in_place_a_second_run_makes_nothing_new(tmp_path, settings, glob):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png", sample_image("RGBA", 3, 3))
    inputs = [f"{tmp_path}/*"] if glob else [tmp_path]
    run(inputs, tmp_path, suffix=".jpg")
    first = contents(tmp_path)
    assert sorted(first) == ["a.jpg", "a.png", "b.png", "b_2.png"]
    plan = plan_jobs(inputs, tmp_path, suffix=".jpg")
    assert [job.source.name for job in plan] == ["a.png", "b.png"]
    assert plan.ignored["results of earlier runs"] == 2
    results = batch.run(plan, FakeModel(), settings)
    assert statuses(results) == ["skipped" if settings.skip_existing else "done"] * 2
    assert contents(tmp_path) == first


def test_results_are_inputs_where_they_were_meant(tmp_path):
    save(tmp_path / "in" / "a.png")
    run([tmp_path / "in"], tmp_path / "in" / "x4")
    # The folder itself, or the file itself: enlarge again. Below another folder: left alone.
    assert statuses(run([tmp_path / "in" / "x4"], tmp_path / "x16")) == ["done"]
    assert statuses(run([tmp_path / "in" / "x4" / "a.png"], tmp_path / "again")) == ["done"]
    plan = plan_jobs([tmp_path / "in"], tmp_path / "other", recursive=True)
    assert [job.relative.as_posix() for job in plan] == ["a.png"]
    assert plan.ignored["results of earlier runs"] == 1


def test_names_do_not_depend_on_earlier_results(tmp_path):
    for name in ("a.jpg", "a.gif", "b.webp"):
        save(tmp_path / "in" / name)
    first = [result.output for result in run([tmp_path / "in"], tmp_path / "out", suffix=".png")]
    assert [result.output for result in run([tmp_path / "in"], tmp_path / "out", suffix=".png")] == first
    Path(first[1]).unlink()
    assert [result.output for result in run([tmp_path / "in"], tmp_path / "out", RESUME, suffix=".png")] == first


def test_what_a_killed_run_left_is_removed_and_never_an_input(tmp_path):
    three(tmp_path / "in")
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".tinysr-0123456789abcdef.part").write_bytes(b"half")
    assert statuses(run([tmp_path / "in"], tmp_path / "out")) == ["done"] * 3
    assert written(tmp_path / "out") == ["a.png", "b.png", "c.png"]
    assert (tmp_path / "in" / ".tinysr-0123456789abcdef.part").exists()  # not this run's folder
    run([tmp_path / "in"], tmp_path / "in", suffix=".webp")
    assert not (tmp_path / "in" / ".tinysr-0123456789abcdef.part").exists()


def test_a_failure_is_tried_again(tmp_path):
    three(tmp_path / "in")
    assert statuses(run([tmp_path / "in"], tmp_path / "out", model=Failing(ValueError("x")))).count("failed") == 1
    assert statuses(run([tmp_path / "in"], tmp_path / "out", RESUME)) == ["skipped", "done", "skipped"]


def test_concurrent_runs_on_one_folder(tmp_path):
    """Each result is whole, made from its own input, on record, and there once."""
    for i in range(12):
        mode = "RGBA" if i % 3 == 0 else "RGB"
        save(tmp_path / "in" / f"{i:02}.webp", sample_image(mode, 5, 4, seed=i), lossless=True)
    run([tmp_path / "in"], tmp_path / "alone", suffix=".jpg")
    outcomes: list[list[str]] = []
    threads = [
        threading.Thread(
            target=lambda: outcomes.append(
                statuses(run([tmp_path / "in"], tmp_path / "out", Settings(skip_existing=True), suffix=".jpg"))
            )
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(status in ("done", "skipped") for outcome in outcomes for status in outcome)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert statuses(run([tmp_path / "in"], tmp_path / "out", RESUME, suffix=".jpg")) == ["skipped"] * 12
