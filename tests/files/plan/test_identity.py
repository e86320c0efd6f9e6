"""No spelling of an output leads to an input, now or just before the rename."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.files.runs import contents, run, save
from tests.runtime.sample_images import FakeModel, sample_image
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.files.plan.identity import Originals, entry, identities, same_file

pytestmark = pytest.mark.skipif(os.name == "nt", reason="POSIX links")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory: album/ with two images, photo.png, and links to both."""
    monkeypatch.chdir(tmp_path)
    save(Path("album/a.png"))
    save(Path("album/b.jpg"))
    save(Path("photo.png"))
    Path("linked").symlink_to("album")
    Path("link.png").symlink_to("photo.png")
    Path("deep/er").mkdir(parents=True)
    Path("shortcut").symlink_to("deep/er")
    return tmp_path


@pytest.mark.parametrize(
    "output",
    [
        "photo.png",
        "./photo.png",
        "new/../photo.png",
        "new/newer/../../photo.png",
        "album/../photo.png",
        "shortcut/../../photo.png",
        "link.png",
        "new/../link.png",
        "hard.png",
        "new/../hard.png",
        "{here}/photo.png",
    ],
)
def test_an_input_is_not_replaced_by_any_of_its_names(here, output):
    os.link("photo.png", "hard.png")
    before = contents(here)
    (result,) = run(["photo.png"], output.format(here=here))
    assert result.status == "failed"
    assert "never overwritten" in result.error["message"]
    assert contents(here) == before
    assert not Path("new").exists()  # it was seen before anything was made


@pytest.mark.parametrize("output", ["album", "new/../album", "linked", "linked/../album/.", "album/", "new/..//linked"])
def test_a_folder_is_not_replaced_by_any_of_its_names(here, output):
    before = contents(here)
    results = run(["album"], output)
    assert [result.status for result in results] == ["failed", "failed"]
    assert contents(here) == before


def test_a_symbolic_link_that_is_an_input_is_not_replaced(here):
    before = contents(here)
    for given in (["link.png"], ["link.png", "photo.png"]):
        assert {result.status for result in run(given, ".")} == {"failed"}
    assert Path("link.png").is_symlink()
    assert contents(here) == before


class Meanwhile(FakeModel):
    """Does something while the network runs."""

    def __init__(self, action) -> None:
        super().__init__()
        self.action = action

    def enlarge(self, rgb):
        self.action()
        return super().enlarge(rgb)


def test_an_output_folder_that_becomes_the_input_folder_midway(here):
    before = contents(here / "album")

    def swap():
        if not Path("out").is_symlink():
            os.rename("out", "elsewhere")
            os.symlink("album", "out")

    results = run(["album"], "out", model=Meanwhile(swap))
    assert [result.status for result in results] == ["failed", "failed"]
    assert contents(here / "album") == before


def test_an_output_that_becomes_a_hard_link_of_the_input_midway(here):
    before = Path("photo.png").read_bytes()
    (result,) = run(["photo.png"], "big.png", model=Meanwhile(lambda: os.link("photo.png", "big.png")))
    assert result.status == "failed"
    assert Path("photo.png").read_bytes() == before


def test_the_fallback_never_replaces_an_input(here):
    save(Path("logo.png"), sample_image("RGBA", 3, 3))
    before = Path("logo.png").read_bytes()
    (result,) = run(["logo.png"], "logo.jpg")
    assert (result.status, result.output) == ("done", "logo_2.png")
    assert Path("logo.png").read_bytes() == before
    assert not Path("logo.jpg").exists()


def test_identities_of_links_and_entries(here):
    assert same_file("photo.png", "link.png")
    assert entry("photo.png") != entry("link.png")
    assert entry("linked/a.png") == entry("album/a.png")
    assert identities("link.png", follow_link=False).isdisjoint(identities("photo.png"))
    assert not same_file("album/a.png", "album/b.jpg")
    originals = Originals([Path("photo.png")])
    assert originals.hold(Path("link.png"), follow_link=True)
    assert not originals.hold(Path("link.png"), follow_link=False)


def test_planning_creates_nothing(here):
    before = sorted(path.name for path in here.rglob("*"))
    plan_jobs(["album"], "new/../out")
    plan_jobs(["photo.png"], "new/big.png")
    assert sorted(path.name for path in here.rglob("*")) == before
