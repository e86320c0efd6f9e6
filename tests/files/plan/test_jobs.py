"""Which inputs a run has and how its outputs are named, before anything is written."""

from __future__ import annotations

import pytest

from tests.files.runs import names, run, save
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.jobs import is_video, plan_jobs


def test_one_file_to_one_file(tmp_path):
    source = save(tmp_path / "a.png")
    (job,) = plan_jobs([source], tmp_path / "b.jpg")
    assert job.output == tmp_path / "b.jpg"
    assert job.fallback == tmp_path / "b.png"


def test_an_output_without_an_image_suffix_is_a_folder(tmp_path):
    source = save(tmp_path / "a.png")
    assert names(plan_jobs([source], tmp_path / "out"), tmp_path) == ["out/a.png"]
    (tmp_path / "folder.png").mkdir()
    assert names(plan_jobs([source], tmp_path / "folder.png"), tmp_path) == ["folder.png/a.png"]
    assert names(plan_jobs([source], f"{tmp_path}/new.png/"), tmp_path) == ["new.png/a.png"]


@pytest.mark.parametrize(
    ("output", "message"),
    [("b.gif", "cannot write .gif"), ("b.heic", "cannot write .heic"), ("notes.txt", "is a file")],
)
def test_unusable_outputs_are_refused(tmp_path, output, message):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match=message):
        plan_jobs([save(tmp_path / "a.png")], tmp_path / output)


def test_several_inputs_need_a_folder(tmp_path):
    sources = [save(tmp_path / "a.png"), save(tmp_path / "b.png")]
    with pytest.raises(InputError, match="cannot write 2 inputs to one file"):
        plan_jobs(sources, tmp_path / "c.png")
    with pytest.raises(InputError, match="inputs to one file"):
        plan_jobs([tmp_path], tmp_path / "c.png")
    with pytest.raises(InputError, match="no inputs"):
        plan_jobs([], tmp_path / "out")
    with pytest.raises(InputError, match="contradicts"):
        plan_jobs(sources[:1], tmp_path / "c.png", suffix=".jpg")
    with pytest.raises(InputError, match=r"cannot write \.xyz"):
        plan_jobs(sources, tmp_path / "out", suffix=".xyz")


def test_formats_are_kept_where_they_can_be_written(tmp_path):
    for name in ("a.jpg", "b.gif", "c.webp", "d.TIF"):
        save(tmp_path / "in" / name)
    (tmp_path / "in" / "e").write_bytes((tmp_path / "in" / "b.gif").read_bytes())
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out")
    assert names(jobs, tmp_path / "out") == ["a.jpg", "b.png", "c.webp", "d.TIF", "e.png"]
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out", suffix=".webp")
    assert names(jobs, tmp_path / "out") == ["a.webp", "b.webp", "c.webp", "d.webp", "e.webp"]


def test_name_collisions_append_the_old_suffix_to_the_stem(tmp_path):
    for name in ("in/a.jpg", "in/a.png", "in/A.webp", "in/b.png", "other/b.png", "in/a_png.gif"):
        save(tmp_path / name)
    jobs = plan_jobs([tmp_path / "in", tmp_path / "other"], tmp_path / "out", suffix=".png")
    found = dict(
        zip([job.source.relative_to(tmp_path).as_posix() for job in jobs], names(jobs, tmp_path / "out"), strict=True)
    )
    assert found == {
        "in/A.webp": "A_webp.png",
        "in/a.jpg": "a_jpg.png",
        "in/a.png": "a_png_2.png",
        "in/a_png.gif": "a_png.png",
        "in/b.png": "b_png.png",
        "other/b.png": "b_png_2.png",
    }
    backwards = plan_jobs([tmp_path / "other", tmp_path / "in"], tmp_path / "out", suffix=".png")
    assert len({str(job.output).casefold() for job in backwards}) == 6


def test_fallback_names_never_collide_with_other_results(tmp_path):
    for name in ("a.jpg", "a.png", "b.webp"):
        save(tmp_path / "in" / name)
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out")
    assert [job.fallback.name for job in jobs] == ["a_jpg.png", "a.png", "b.png"]


def test_recursion_mirrors_folders_and_skips_the_output(tmp_path):
    for name in ("a.png", "x/b.png", "x/y/c.png", "out/old.png"):
        save(tmp_path / name)
    jobs = plan_jobs([tmp_path], tmp_path / "out", recursive=True)
    assert names(jobs, tmp_path / "out") == ["a.png", "x/b.png", "x/y/c.png"]
    flat = plan_jobs([tmp_path], tmp_path / "out")
    assert [(job.source.name, job.problem) for job in flat] == [("a.png", None)]
    assert flat.ignored == {"subfolders, without --recursive": 1}


def test_links_to_folders_are_not_followed(tmp_path):
    save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out", recursive=True)
    assert [job.source.name for job in jobs] == ["a.png"]
    assert jobs.ignored == {"links to folders": 1}


def test_globs_quoted_names_with_brackets_and_repeats(tmp_path):
    for name in ("a.png", "b.jpg", "x/c.png", "odd[1].png"):
        save(tmp_path / name)
    jobs = plan_jobs([f"{tmp_path}/*.png", tmp_path / "a.png"], tmp_path / "out")
    assert names(jobs, tmp_path / "out") == ["a.png", "odd[1].png"]
    assert names(plan_jobs([f"{tmp_path}/**/*.png"], tmp_path / "out"), tmp_path / "out") == [
        "a.png",
        "odd[1].png",
        "x/c.png",
    ]
    assert names(plan_jobs([tmp_path / "odd[1].png"], tmp_path / "out"), tmp_path / "out") == ["odd[1].png"]
    (missing,) = plan_jobs([f"{tmp_path}/*.bmp"], tmp_path / "out")
    assert missing.problem == "no file matches"


def test_relative_globs(tmp_path, monkeypatch):
    save(tmp_path / "x" / "c.png")
    monkeypatch.chdir(tmp_path)
    for pattern in ("x/*.png", "./x/*.png", "**/*.png"):
        (job,) = plan_jobs([pattern], "out")
        assert job.output is not None
        assert job.output.name == "c.png"


def test_inputs_are_never_overwritten(tmp_path):
    first, second = save(tmp_path / "a.png"), save(tmp_path / "b.jpg")
    before = first.read_bytes(), second.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for output in (tmp_path, tmp_path / "link"):
        results = run([first, second], output)
        assert [result.status for result in results] == ["failed", "failed"]
        assert "is an input and is never overwritten" in results[0].error["message"]
    assert run([first], first)[0].status == "failed"
    assert (first.read_bytes(), second.read_bytes()) == before
    # In the same folder under another name it works.
    assert run([second], tmp_path, suffix=".webp")[0].status == "done"


def test_videos_are_detected_by_their_first_bytes():
    assert is_video(b"\0\0\0\x20ftypisom" + b"\0" * 50)
    assert is_video(b"\x1aE\xdf\xa3" + b"\0" * 60)
    assert is_video(b"RIFF\0\0\0\0AVI LIST")
    for head in (b"RIFF\0\0\0\0WEBPVP8 ", b"\0\0\0\x20ftypavif", b"GIF89a", b"The wide world", b"", b"\x89PNG\r\n"):
        assert not is_video(head)
