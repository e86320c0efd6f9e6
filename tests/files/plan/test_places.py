"""A file that nobody named is never replaced, links in output folders are not followed, a full disk is said once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from PIL import Image

from tests.files.runs import run, save, written
from tests.files.video.films import make
from tests.runtime.sample_images import FakeModel, sample_image
from tinysr_kernels import atomic
from tinysr_kernels.files.batch import Settings

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX links")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def foreign(name: str) -> Path:
    """A file of somebody else."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"somebody's")
    return path


def test_a_fallback_does_not_replace_what_nobody_named(here):
    source = save(Path("in/a.png"), sample_image("RGBA", 3, 3))
    kept = [foreign("logo.png"), foreign("logo_2.png")]
    (result,) = run([source], "logo.jpg")
    assert (result.status, result.output) == ("done", "logo_3.png")
    assert "written as logo_3.png" in result.notices[-1]
    assert all(path.read_bytes() == b"somebody's" for path in kept)
    assert not Path("logo.jpg").exists()
    # A second run replaces what the first one made, and makes nothing more.
    (again,) = run([source], "logo.jpg")
    assert again.output == "logo_3.png"
    assert written(here) == ["in", "logo.png", "logo_2.png", "logo_3.png"]


def test_an_output_that_the_user_named_needs_no_record(here):
    run([save(Path("in/a.png"))], "b.png")
    assert sorted(path.name for path in here.iterdir()) == ["b.png", "in"]


def test_in_a_folder_only_the_name_of_the_input_replaces(here):
    save(Path("in/a.png"))
    save(Path("in/b.gif"))
    kept = foreign("out/b.png")
    foreign("out/a.png")
    results = run(["in"], "out")
    assert [result.output for result in results] == ["out/a.png", "out/b_2.png"]
    assert kept.read_bytes() == b"somebody's"
    assert Image.open("out/a.png").size == (12, 8)
    assert [result.output for result in run(["in"], "out")] == ["out/a.png", "out/b_2.png"]


def test_another_format_beside_the_original_keeps_the_original_of_that_format(here):
    """`upscale photos/a.jpg -o photos --format png` with a photos/a.png that is no input."""
    save(Path("photos/a.jpg"))
    kept = foreign("photos/a.png")
    (result,) = run(["photos/a.jpg"], "photos", suffix=".png")
    assert result.output == "photos/a_2.png"
    assert kept.read_bytes() == b"somebody's"


def test_numbers_keep_clear_of_other_planned_names(here):
    save(Path("in/a.webp"), sample_image("RGBA", 3, 3), lossless=True)
    save(Path("in/a_2.png"))
    foreign("out/a.png")
    results = run(["in"], "out", suffix=".jpg")
    assert [result.output for result in results] == ["out/a_3.png", "out/a_2.jpg"]


def test_a_name_that_another_run_takes_meanwhile_is_not_replaced(here):
    source = save(Path("in/b.gif"))

    class Overtaken(FakeModel):
        def enlarge(self, rgb):
            foreign("out/b.png")
            return super().enlarge(rgb)

    (result,) = run([source], "out", model=Overtaken())
    assert result.output == "out/b_2.png"
    assert Path("out/b.png").read_bytes() == b"somebody's"


@posix
@pytest.mark.parametrize("target", ["elsewhere.png", "nowhere.png", "in/a.png"])
def test_a_link_in_an_output_folder_is_replaced_and_not_followed(here, target):
    save(Path("in/a.png"))
    foreign("elsewhere.png")
    before = {name: Path(name).read_bytes() for name in ("in/a.png", "elsewhere.png")}
    Path("out").mkdir()
    Path("out/a.png").symlink_to(here / target)
    (result,) = run(["in"], "out")
    assert result.status == "done"
    assert not Path("out/a.png").is_symlink()
    assert Image.open("out/a.png").size == (12, 8)
    assert {name: Path(name).read_bytes() for name in before} == before
    assert not Path("nowhere.png").exists()


@posix
def test_a_link_that_the_user_named_is_followed(here):
    source = save(Path("in/a.png"))
    foreign("elsewhere.png")
    Path("link.png").symlink_to("elsewhere.png")
    Path("dangling.png").symlink_to("new.png")
    for name, target in (("link.png", "elsewhere.png"), ("dangling.png", "new.png")):
        assert run([source], name)[0].status == "done"
        assert Path(name).is_symlink()
        assert Image.open(target).size == (12, 8)


@posix
def test_a_linked_subfolder_does_not_lead_out_of_the_output_folder(here):
    save(Path("in/a.png"))
    save(Path("in/sub/b.png"))
    kept = foreign("elsewhere/b.png")
    Path("out").mkdir()
    Path("out/sub").symlink_to(here / "elsewhere")
    results = run(["in"], "out", recursive=True)
    assert [result.status for result in results] == ["done", "failed"]
    assert "leads out of the output folder" in results[1].error["message"]
    assert kept.read_bytes() == b"somebody's"
    # The folder that the user named may be a link itself.
    Path("linked").symlink_to("real")
    Path("real").mkdir()
    assert run(["in/a.png"], "linked")[0].status == "done"
    assert written(Path("real")) == ["a.png"]


@posix
def test_films_are_placed_like_images(here):
    Path("in").mkdir()
    make(Path("in/a.mp4"))
    os.rename(make_avi(), "in/b.avi")
    kept = [foreign("elsewhere.mp4"), foreign("out/b.mkv")]
    Path("out/a.mp4").symlink_to(here / "elsewhere.mp4")
    results = run(["in"], "out")
    assert [result.output for result in results] == ["out/a.mp4", "out/b_2.mkv"], results
    assert not Path("out/a.mp4").is_symlink()
    assert all(path.read_bytes() == b"somebody's" for path in kept)
    assert [result.status for result in run(["in"], "out", Settings(skip_existing=True))] == ["skipped"] * 2

    class Linking(FakeModel):
        def stream(self, frames, *, on_error="raise"):
            os.link("in/a.mp4", "big.mp4")
            yield from super().stream(frames, on_error=on_error)

    before = Path("in/a.mp4").read_bytes()
    (result,) = run(["in/a.mp4"], "big.mp4", model=Linking())
    assert "never overwritten" in result.error["message"]
    assert Path("in/a.mp4").read_bytes() == before


def make_avi() -> Path:
    """A film in a container that is not written."""
    make(Path("film.mkv"))
    return Path("film.mkv")


def test_a_full_disk_fails_the_rest_without_the_network_and_recovers(here, monkeypatch):
    for name in "abcde":
        save(Path(f"in/{name}.png"))
    room = [False]
    write = atomic.write_bytes

    def full(path, data, **options):
        if not room[0] and path.name != "a.png":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data, **options)

    def has_room(_folder, size):
        assert size > 0
        room[0] = len(asked) == 1
        asked.append(size)
        return room[0]

    asked: list[int] = []
    monkeypatch.setattr(atomic, "write_bytes", full)
    monkeypatch.setattr(atomic, "has_room", has_room)
    model = FakeModel()
    results = run(["in"], "out", model=model)
    assert [result.status for result in results] == ["done", "failed", "failed", "done", "done"]
    assert [result.error["type"] for result in results if result.error] == ["OSError", "DiskFull"]
    assert model.calls == 4
    assert len(asked) == 2


def test_room_is_found_by_trying(here, monkeypatch):
    assert atomic.has_room(here, 1000)
    if hasattr(os, "posix_fallocate"):

        def quota(*_arguments):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr(os, "posix_fallocate", quota)
        assert not atomic.has_room(here, 1000)
    assert os.listdir(here) == []


def test_too_many_open_files_fail_one_image_and_not_the_others(here, monkeypatch):
    for name in "abc":
        save(Path(f"in/{name}.png"))
    create = atomic._create
    calls = []

    def exhausted(target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EMFILE, "Too many open files")
        return create(target)

    monkeypatch.setattr(atomic, "_create", exhausted)
    results = run(["in"], "out", Settings())
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert "Too many open files" in results[1].error["message"]
