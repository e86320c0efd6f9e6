"""The first minute: `tinysr` alone, and `tinysr upscale photo.jpg` alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from PIL import Image

from tinysr_kernels.cli.main import main


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (5, 4), (200, 30, 40)).save(path)
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_without_arguments_examples_are_shown(capsys) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tinysr")
    assert shown.count("\n  tinysr upscale ") == 3


def test_the_result_lies_beside_the_photo_and_replaces_nothing(compiled, photo: Path, capsys) -> None:
    before = digest(photo)
    assert main(["upscale", str(photo)]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines() == [str(photo.with_name("photo_x4.jpg"))]
    assert shown.err.count("using the small model in the package") == 1
    assert Image.open(photo.with_name("photo_x4.jpg")).size == (20, 16)
    first = digest(photo.with_name("photo_x4.jpg"))
    assert main(["upscale", str(photo), "--model", "demo"]) == 0
    assert "using the small model" not in capsys.readouterr().err
    assert names(photo.parent) == {"photo.jpg", "photo_x4.jpg", "photo_x4_2.jpg"}
    assert (digest(photo), digest(photo.with_name("photo_x4.jpg"))) == (before, first)


@pytest.mark.parametrize(
    ("options", "name", "size"),
    [
        (["--scale", "2"], "photo_x2.jpg", (10, 8)),
        (["--scale", "1.5"], "photo_x1.5.jpg", (8, 6)),
        (["--size", "15x12"], "photo_15x12.jpg", (15, 12)),
        (["--longest", "10"], "photo_10.jpg", (10, 8)),
        (["--format", "png"], "photo_x4.png", (20, 16)),
    ],
)
def test_the_name_says_how_large(compiled, photo: Path, options: list[str], name: str, size: tuple[int, int]) -> None:
    assert main(["upscale", str(photo), *options, "-q"]) == 0
    assert names(photo.parent) == {"photo.jpg", name}
    assert Image.open(photo.with_name(name)).size == size


def test_several_files_in_several_folders(compiled, photo: Path, monkeypatch) -> None:
    """Relative names, a glob, formats that cannot be written, no suffix, a name that is taken by another result."""
    folder = photo.parent / "inside"
    folder.mkdir()
    Image.new("RGB", (3, 2)).save(folder / "photo.jpg")
    Image.new("L", (3, 2)).save(folder / "gray.pgm")
    Image.new("RGB", (3, 2)).save(folder / "plain", "PNG")
    Image.new("RGB", (3, 2)).save(folder / "PHOTO.PNG")
    monkeypatch.chdir(folder)
    assert (
        main(["upscale", "../photo.jpg", "photo.jpg", "gray.pgm", "plain", "PHOTO.PNG", "-q", "--format", "png"]) == 0
    )
    assert names(photo.parent) == {"photo.jpg", "photo_x4.png", "inside"}
    made = names(folder) - {"photo.jpg", "gray.pgm", "plain", "PHOTO.PNG"}
    assert made == {"photo_x4.png", "gray_x4.png", "plain_x4.png", "PHOTO_x4_2.PNG"} or made == {
        "photo_x4.png", "gray_x4.png", "plain_x4.png", "PHOTO_x4_2.png",
    }  # fmt: skip
    assert main(["upscale", "*.jpg", "-q"]) == 0
    assert "photo_x4.jpg" in names(folder)


def test_the_longest_names_are_cut(compiled, tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 125 + ".png")
    Image.new("RGB", (3, 2)).save(path)
    assert main(["upscale", str(path), "-q"]) == 0
    assert main(["upscale", str(path), "-q"]) == 0
    assert sorted(name[-6:] for name in names(tmp_path) - {path.name}) == ["_2.png", "x4.png"]


def test_what_needs_a_named_output(photo: Path, capsys) -> None:
    for arguments, message in (
        ([str(photo.parent)], "is a folder: name one for its results with -o"),
        ([str(photo), "--skip-existing"], "name one with -o"),
    ):
        assert main(["upscale", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert names(photo.parent) == {"photo.jpg"}


def test_a_file_that_is_no_image_fails_alone(compiled, photo: Path, capsys) -> None:
    (photo.parent / "broken.png").write_bytes(b"no image")
    assert main(["upscale", str(photo.parent / "broken.png"), str(photo)]) == 1
    assert names(photo.parent) == {"photo.jpg", "broken.png", "photo_x4.jpg"}
