"""Names of outputs: formats from suffix or content, limits in bytes, what is a folder and what a slip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.files.runs import names, run, save, written
from tests.runtime.sample_images import bytes_of, sample_image
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.files.plan.outputs import MAX_NAME_BYTES, fit, with_stem_end


def put(path: Path, form: str, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes_of(sample_image("RGB", 3, 2), form, **options))


@pytest.mark.parametrize(
    ("name", "form", "result"),
    [
        ("photo", "JPEG", "photo.jpg"),
        ("photo", "PNG", "photo.png"),
        ("photo", "WEBP", "photo.webp"),
        ("photo", "TIFF", "photo.tif"),
        ("photo", "BMP", "photo.bmp"),
        ("photo", "AVIF", "photo.avif"),
        ("photo", "GIF", "photo.png"),
        ("photo", "PPM", "photo.png"),
        ("IMG.2024", "JPEG", "IMG.2024.jpg"),
        ("photo.dat", "JPEG", "photo.dat.jpg"),
        ("photo.jfif", "JPEG", "photo.jpg"),
        ("photo.gif", "JPEG", "photo.jpg"),
        ("photo.gif", "GIF", "photo.png"),
        ("photo.JPG", "PNG", "photo.JPG"),
    ],
)
def test_the_format_follows_from_the_suffix_else_from_the_content(tmp_path, name, form, result):
    put(tmp_path / "in" / name, form)
    assert names(plan_jobs([tmp_path / "in"], tmp_path / "out"), tmp_path / "out") == [result]
    assert [each.status for each in run([tmp_path / "in"], tmp_path / "out")] == ["done"]
    with Image.open(tmp_path / "out" / result) as image:
        assert image.size == (12, 8)


def test_numbers_after_a_dot_do_not_clash(tmp_path):
    for year in (2024, 2025):
        put(tmp_path / "in" / f"IMG.{year}", "JPEG")
    plan = plan_jobs([tmp_path / "in"], tmp_path / "out")
    assert names(plan, tmp_path / "out") == ["IMG.2024.jpg", "IMG.2025.jpg"]


@pytest.mark.parametrize(
    "name", ["v1.5", "2026.11.30", "out", ".out", "St. Johns", "a.b/", "x.exr/", "x.png/", "..", "."]
)
def test_folders(tmp_path, monkeypatch, name):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    source = save(tmp_path / "in" / "a.png")
    (job,) = plan_jobs([source], name)
    assert job.output == Path(name) / "a.png"
    assert run([source], name)[0].status == "done"


@pytest.mark.parametrize("name", ["x.exr", "x.gif", "photos.new", "x.safetensors", "x.tiff2", "-", "", "a.png/o", "n/"])
def test_slips_are_refused_and_nothing_is_made(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    source = save(tmp_path / "a.png")
    (tmp_path / "n").write_text("a file")
    with pytest.raises(InputError):
        plan_jobs([source], name)
    assert sorted(os.listdir(tmp_path)) == ["a.png", "n"]


def test_a_refused_suffix_says_how_to_name_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot write \.exr; choose one of .*, or write x\.exr/ for a folder"):
        plan_jobs([save(tmp_path / "a.png")], "x.exr")
    (tmp_path / "x.exr").mkdir()
    assert plan_jobs([tmp_path / "a.png"], "x.exr")[0].output == Path("x.exr/a.png")


@pytest.mark.skipif(os.name == "nt", reason="POSIX special files")
def test_special_files_are_no_outputs(tmp_path):
    source = save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "fifo.png")
    for output in ("/dev/null", tmp_path / "fifo.png"):
        with pytest.raises(InputError):
            plan_jobs([source], output)


@pytest.mark.parametrize("letter", ["x", "ä", "\N{GRINNING FACE}"])
def test_the_limit_of_names_is_in_bytes(tmp_path, letter):
    size = len(letter.encode())
    stem = letter * ((MAX_NAME_BYTES - 4) // size)
    put(tmp_path / "in" / f"{stem}.png", "PNG")
    put(tmp_path / "in" / f"{stem}.jpg", "JPEG")
    put(tmp_path / "in" / f"{stem}.gif", "GIF")
    put(tmp_path / "in" / (letter * (MAX_NAME_BYTES // size)), "JPEG")
    results = run([tmp_path / "in"], tmp_path / "out", suffix=".webp")
    assert [result.status for result in results] == ["done"] * 4, results
    found = written(tmp_path / "out")
    assert len(found) == 4
    assert all(len(os.fsencode(name)) <= MAX_NAME_BYTES and name.endswith(".webp") for name in found)
    again = run([tmp_path / "in"], tmp_path / "out", suffix=".tiff")
    assert [result.status for result in again] == ["done"] * 4


def test_names_are_cut_in_whole_characters():
    assert fit(Path("ä" * 200 + ".png")) == Path("ä" * 125 + ".png")
    assert with_stem_end(Path("d") / ("x" * 251 + ".png"), "_12") == Path("d") / ("x" * 248 + "_12.png")
    assert fit(Path("short.png")) == Path("short.png")
