"""Shared by the tests of runs: folders of inputs, what came out, networks that fail."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from tests.runtime.sample_images import FakeModel, noise, sample_image
from tinysr_kernels.files import batch
from tinysr_kernels.files.jobs import Job, plan_jobs
from tinysr_kernels.files.picture_io import write_image
from tinysr_kernels.files.plan.records import FILE_NAME


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or sample_image("RGB", 3, 2)).save(path, **options)
    return path


def names(jobs: list[Job], folder: Path) -> list[str | None]:
    return [job.output.relative_to(folder).as_posix() if job.output else None for job in jobs]


def run(inputs, output, settings=None, model=None, **options):
    jobs = plan_jobs([str(path) for path in inputs], output, **options)
    return batch.run(jobs, model or FakeModel(), settings)


def written(folder: Path) -> list[str]:
    """The names of the results in a folder, sorted; without the file of records, which is checked to be there."""
    names = sorted(path.name for path in folder.iterdir())
    assert not names or FILE_NAME in names
    return [name for name in names if name != FILE_NAME]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all results below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != FILE_NAME)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


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
        "notes.jpg": b"remember the milk\n",
    }.items():
        (folder / name).write_bytes(data)
        expected[name] = None
    for name, data in {  # ordinary, and ignored
        "notes.txt": b"remember the milk\n",
        "Thumbs.db": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 500,
        ".DS_Store": b"\0\0\0\1Bud1" + b"\0" * 100,
    }.items():
        (folder / name).write_bytes(data)
    (folder / "sub").mkdir()
    save(folder / "frames.gif", sample_image("P", 5, 5), save_all=True, append_images=[sample_image("P", 5, 5, seed=1)])
    expected["frames.gif"] = None
    return expected


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
