"""Runs over many files: planned names, failures reported per file, no input overwritten, no partial result."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.sample_images import FakeModel, noise, sample_image
from tinysr_kernels.errors import InputError, NonFiniteOutput
from tinysr_kernels.files import batch
from tinysr_kernels.files.batch import Settings
from tinysr_kernels.files.encode import Encoding
from tinysr_kernels.files.jobs import Job, is_video, plan_jobs
from tinysr_kernels.files.picture_io import read_image, write_image
from tinysr_kernels.runtime.images.metadata import Metadata


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or sample_image("RGB", 3, 2)).save(path, **options)
    return path


def names(jobs: list[Job], folder: Path) -> list[str | None]:
    return [job.output.relative_to(folder).as_posix() if job.output else None for job in jobs]


def run(inputs, output, settings=None, model=None, **options):
    jobs = plan_jobs([str(path) for path in inputs], output, **options)
    return batch.run(jobs, model or FakeModel(), settings)


# Names


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
    assert [(job.source.name, job.problem) for job in flat] == [
        ("a.png", None),
        ("x", "a subfolder; use --recursive to include it"),
    ]


def test_links_to_folders_are_not_followed(tmp_path):
    save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out", recursive=True)
    assert [job.problem is None for job in jobs] == [True, False]


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


# A folder with every type of file


def fill(folder: Path) -> dict[str, tuple[str, tuple[int, int]] | None]:
    """Write every type of file. Returns the expected mode and size of each result, None for a failure."""
    folder.mkdir()
    expected: dict[str, tuple[str, tuple[int, int]] | None] = {}

    def add(name: str, image: Image.Image, mode: str, **options) -> None:
        save(folder / name, image, **options)
        expected[name] = (mode, (image.width * 4, image.height * 4))

    add("gray.png", sample_image("L", 9, 7), "L")
    add("gray.jpg", sample_image("L", 9, 7), "L")
    add("bilevel.png", sample_image("1", 9, 7), "L")
    add("palette.png", sample_image("P", 9, 7), "RGB")
    add("palette-hole.png", sample_image("P+", 9, 7), "RGBA", transparency=0)
    add("alpha.png", sample_image("RGBA", 9, 7), "RGBA")
    add("gray-alpha.png", sample_image("LA", 9, 7), "LA")
    add("gray16.png", sample_image("I;16", 9, 7), "I;16")
    add("cmyk.jpg", sample_image("CMYK", 9, 7), "RGB")
    add("cmyk.tif", sample_image("CMYK", 9, 7), "RGB")
    add("one.png", sample_image("RGB", 1, 1), "RGB")
    add("thin.png", sample_image("RGB", 2, 37), "RGB")
    add("white.png", Image.new("RGB", (20, 20), "white"), "RGB")
    add("black.png", Image.new("RGB", (20, 20)), "RGB")
    add("wrong-suffix.jpg", sample_image("RGB", 9, 7), "RGB", format="PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "rotated.jpg", sample_image("RGB", 9, 7), exif=exif)
    expected["rotated.jpg"] = ("RGB", (28, 36))
    write_image(folder / "rgb16.png", noise(7, 9, 3, "uint16"))
    write_image(folder / "rgb16.tif", noise(7, 9, 3, "uint16"))
    expected["rgb16.png"] = expected["rgb16.tif"] = ("RGB;16", (36, 28))
    whole = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(whole, "JPEG")
    for name, data in {
        "truncated.jpg": whole.getvalue()[:900],
        "empty.png": b"",
        "notes.txt": b"remember the milk\n",
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 500,
        ".DS_Store": b"\0\0\0\1Bud1" + b"\0" * 100,
    }.items():
        (folder / name).write_bytes(data)
        expected[name] = None
    (folder / "sub").mkdir()
    expected["sub"] = None
    save(folder / "frames.gif", sample_image("P", 5, 5), save_all=True, append_images=[sample_image("P", 5, 5, seed=1)])
    expected["frames.gif"] = None
    return expected


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
        written = read_image(line["output"])
        assert (written.mode, written.size) == (mode, size)
        assert line["seconds"] >= 0
    assert expected == {}
    assert len(list((tmp_path / "out").iterdir())) == sum(line["status"] == "done" for line in lines)
    notices = {Path(line["input"]).name: line["notices"] for line in lines}
    assert notices["cmyk.jpg"] == ["CMYK was converted to RGB"]
    assert notices["white.png"] == []


def test_a_second_run_skips_existing_results(tmp_path):
    fill(tmp_path / "in")
    model = FakeModel()
    first = run([tmp_path / "in"], tmp_path / "out", model=model)
    calls = model.calls
    done = [result for result in first if result.status == "done"]
    Path(done[0].output).unlink()
    second = run([tmp_path / "in"], tmp_path / "out", Settings(skip_existing=True), model)
    assert model.calls == calls + 1
    assert sum(result.status == "skipped" for result in second) == len(done) - 1
    assert sum(result.status == "failed" for result in second) == len(first) - len(done)


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


class Failing(FakeModel):
    """Fails for images two pixels wide."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def enlarge(self, rgb):
        if rgb.shape[-1] == 2:
            raise self.error
        return super().enlarge(rgb)


def three(folder: Path) -> Path:
    for name, width in (("a.png", 3), ("b.png", 2), ("c.png", 3)):
        save(folder / name, sample_image("RGB", width, 3))
    return folder


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


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
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a.png"]
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
