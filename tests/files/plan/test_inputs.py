"""What counts as an input, what is left alone, what is a failure."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
from PIL import Image

from tests.files.runs import run, save, written
from tests.runtime.sample_images import FakeModel
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.files.plan import inputs

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX links and special files")


def sources(plan) -> list[str]:
    return [job.source.name for job in plan]


@posix
def test_links_and_hard_links_are_inputs_of_their_own(tmp_path):
    save(tmp_path / "in" / "a.png")
    os.link(tmp_path / "in" / "a.png", tmp_path / "in" / "hard.png")
    (tmp_path / "in" / "link.png").symlink_to("a.png")
    results = run([tmp_path / "in"], tmp_path / "out")
    assert [result.status for result in results] == ["done"] * 3
    assert written(tmp_path / "out") == ["a.png", "hard.png", "link.png"]


@posix
def test_one_name_met_twice_is_one_input(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("in/a.png"))
    Path("linked").symlink_to("in")
    plan = plan_jobs(["in/a.png", "in", "./in/../in/a.png", "linked/a.png", "in/*.png", str(tmp_path / "in")], "out")
    assert sources(plan) == ["a.png"]


ORDINARY = {
    inputs.HIDDEN: [".DS_Store", "._a.png", ".a.png.0123abcd.part", ".picasa.ini", ".tinysr-0123456789abcdef.part"],
    inputs.OTHER: ["Thumbs.db", "desktop.ini", "a.xmp", "a.json", "a.txt", "IMG_1.AAE", "empty", "script.py", "a.svg"],
}


def test_ordinary_folders_have_no_failures(tmp_path):
    save(tmp_path / "a.png")
    for name in [name for names in ORDINARY.values() for name in names]:
        data = b"" if name == "empty" else b"\0\5\x16\7\0\2\0\0Mac OS X" if name == "._a.png" else b"some text\n"
        (tmp_path / name).write_bytes(data)
    for name in ("sub", ".thumbnails", "@eaDir", "__MACOSX"):
        save(tmp_path / name / "thumb.png")
    if os.name != "nt":
        (tmp_path / "self").symlink_to(tmp_path)
    plan = plan_jobs([tmp_path], tmp_path / "out", recursive=True)
    assert sources(plan) == ["a.png", "thumb.png"]
    assert plan.ignored[inputs.HIDDEN] == len(ORDINARY[inputs.HIDDEN]) + 1
    assert plan.ignored[inputs.OTHER] == len(ORDINARY[inputs.OTHER])
    assert plan.ignored[inputs.SYSTEM] == 2
    assert plan.ignored[inputs.LINKED] == (os.name != "nt")
    flat = plan_jobs([tmp_path], tmp_path / "out")
    assert sources(flat) == ["a.png"]
    assert all(result.status == "done" for result in run([tmp_path], tmp_path / "out"))


def test_what_was_named_itself_is_never_ignored(tmp_path):
    (tmp_path / "notes.txt").write_text("remember the milk")
    (tmp_path / ".hidden").mkdir()
    hidden = save(tmp_path / ".photo.png")
    inside = save(tmp_path / ".hidden" / "b.png")
    unfinished = save(tmp_path / ".tinysr-0123456789abcdef.part", format="PNG")
    results = run([tmp_path / "notes.txt", hidden, inside, tmp_path / "none.png", unfinished], tmp_path / "out")
    assert [result.status for result in results] == ["failed", "done", "done", "failed", "failed"]
    assert "an unfinished result" in results[4].error["message"]
    assert "text, not an image" in results[0].error["message"]
    assert "no such file" in results[3].error["message"]


def test_files_that_claim_to_be_images_or_films_are_failures(tmp_path):
    save(tmp_path / "a.png")
    for name in ("text.jpg", "empty.webp", "text.mkv", "text.heic", "text.wmv"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"remember the milk, " * 9)
    results = run([tmp_path], tmp_path / "out")
    assert {Path(result.input).name for result in results if result.status == "failed"} == {
        "text.jpg",
        "empty.webp",
        "text.mkv",
        "text.heic",
        "text.wmv",
    }
    assert all(result.input in result.error["message"] for result in results if result.error)


@posix
@pytest.mark.parametrize("suffix", ["", ".png"])
def test_special_files_are_named_or_ignored_and_never_opened(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)  # a socket's name is short
    save(Path("in/a.png"))
    os.mkfifo(f"in/fifo{suffix}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"in/socket{suffix}")
        Path(f"in/loop{suffix}").symlink_to(f"loop{suffix}")
        Path(f"in/dangling{suffix}").symlink_to("nowhere")
        Path(f"in/device{suffix}").symlink_to(os.devnull)
        plan = plan_jobs(["in"], "out")
    problems = {job.source.name.removesuffix(suffix): job.problem for job in plan if job.problem}
    if suffix:
        assert problems["dangling"] == "a link that leads nowhere"
        assert problems["fifo"] == problems["socket"] == problems["device"] == "not a regular file"
        assert "cannot be read" in problems["loop"]
    else:
        assert list(problems) == ["loop"]  # it may be anything
        assert plan.ignored[inputs.OTHER] == 4
    assert [result.status for result in run(["in"], "out")].count("done") == 1
    named = plan_jobs([f"in/fifo{suffix}"], "out")
    assert named[0].problem == "not a regular file"


@pytest.mark.parametrize("bad", ["", "a\0b"])
def test_empty_and_impossible_names_are_usage_errors(tmp_path, bad):
    source = save(tmp_path / "a.png")
    with pytest.raises(InputError, match="no name"):
        plan_jobs([bad], tmp_path / "out")
    with pytest.raises(InputError, match="no name"):
        plan_jobs([source, bad], tmp_path / "out")
    with pytest.raises(InputError, match="no name"):
        plan_jobs([source], bad)


def test_names_longer_than_any_file_system_takes(tmp_path):
    (job,) = plan_jobs([tmp_path / ("x" * 300)], tmp_path / "out")
    assert job.problem is not None
    (job,) = plan_jobs(["/".join(["x" * 200] * 30)], tmp_path / "out")
    assert job.problem is not None


def test_a_parent_behind_a_wildcard_never_leads_out_of_the_output(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("in/x/a.png"))
    save(Path("in/b.png"))
    save(Path("c.png"))
    for pattern in ("in/*/../*.png", "in/*/../../*.png", "in/*/../x/*.png", "*/*/../../c.png"):
        plan = plan_jobs([pattern], "out")
        assert all(".." not in job.output.parts and job.output.parts[0] == "out" for job in plan)
    assert all(result.status == "done" for result in run(["in/*/../../*.png", "in/*/../*.png"], "out"))
    assert written(Path("out")) == ["b.png", "c.png"]


@posix
def test_globs_through_a_cycle_of_links_give_each_file_once(tmp_path):
    save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert sources(plan_jobs([f"{tmp_path}/in/**/*.png"], tmp_path / "out")) == ["a.png"]


def test_folders_without_any_input_are_failures(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    empty, texts = plan_jobs([tmp_path / "empty", tmp_path / "texts"], tmp_path / "out")
    assert empty.problem == "the folder is empty"
    assert texts.problem == "no image or film in the folder (1 not images or films)"


class Spoiling(FakeModel):
    """Does away with the next inputs while the network runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def enlarge(self, rgb):
        if not self.calls:
            (self.folder / "b.png").unlink()
            (self.folder / "c.png").unlink()
            (self.folder / "c.png").mkdir()
            (self.folder / "d.png").unlink()
            if hasattr(os, "mkfifo"):
                os.mkfifo(self.folder / "d.png")
        return super().enlarge(rgb)


def test_inputs_that_vanish_or_become_something_else_midway(tmp_path):
    for name in "abcde":
        save(tmp_path / "in" / f"{name}.png")
    results = run([tmp_path / "in"], tmp_path / "out", model=Spoiling(tmp_path / "in"))
    assert [result.status for result in results] == ["done", "failed", "failed", "failed", "done"]
    assert all(result.input in result.error["message"] for result in results if result.error)


def test_an_output_folder_that_is_removed_midway_is_made_again(tmp_path):
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png")

    class Removing(FakeModel):
        def enlarge(self, rgb):
            if self.calls == 1:
                shutil.rmtree(tmp_path / "out")
            return super().enlarge(rgb)

    results = run([tmp_path / "in"], tmp_path / "out", model=Removing())
    assert [result.status for result in results] == ["done"] * 3
    assert written(tmp_path / "out") == ["b.png", "c.png"]


@posix
def test_names_that_are_not_utf8_are_names_like_others(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
        os.rename(tmp_path / "x.png", tmp_path / name)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (result,) = run([tmp_path], tmp_path / "out")
    assert result.status == "done"
    assert written(tmp_path / "out") == [name]
    assert result.as_json().isascii()
    assert run([tmp_path / name], tmp_path / "out.jpg")[0].status == "done"
