"""Every file of examples/ runs as a user runs it and leaves what it says; a new example needs an entry in CHECKS."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import tinysr_kernels

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PHOTOS = ROOT / "docs" / "photos"


def run(name: str, folder: Path, *arguments: str) -> str:
    """Run an example in an empty folder and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def demo() -> tinysr_kernels.CompiledSR:
    """The demo checkpoint, compiled in this process."""
    return tinysr_kernels.compile("demo")


def upscaled(name: str, model: tinysr_kernels.CompiledSR) -> np.ndarray:
    """A photograph through a model in this process: uint8 `[4H,4W,3]`."""
    with Image.open(PHOTOS / name) as image:
        return np.asarray(model(image))


def pixels(path: Path) -> np.ndarray:
    """The pixels of a file."""
    with Image.open(path) as image:
        return np.asarray(image)


def check_image(results: Path) -> None:
    assert np.array_equal(pixels(results / "image.png"), upscaled("chelsea.jpg", demo()))


def check_folder(results: Path) -> None:
    written = sorted(path.name for path in (results / "folder").iterdir())
    assert written == sorted(f"{path.stem}.png" for path in PHOTOS.glob("*.jpg"))
    assert np.array_equal(pixels(results / "folder" / "coffee.png"), upscaled("coffee.jpg", demo()))


def frames(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def check_video(results: Path) -> None:
    clip, enlarged = frames(results / "video.mp4"), frames(results / "video-x4.mp4")
    assert len(clip) == len(enlarged) == 12
    assert {frame.shape for frame in clip} == {(64, 96, 3)}
    assert {frame.shape for frame in enlarged} == {(256, 384, 3)}
    # Frame by frame and in order: each result is nearer to the input frame that it was made from than to any other.
    small = [np.asarray(Image.fromarray(frame).resize((96, 64), Image.Resampling.BOX), float) for frame in enlarged]
    for index, result in enumerate(small):
        distances = [np.abs(result - frame).mean() for frame in clip]
        assert int(np.argmin(distances)) == index


def check_stream(results: Path) -> None:
    """The twelfth frame: the window is eleven pixels from the left edge."""
    with Image.open(PHOTOS / "rocket.jpg") as image:
        frame = np.asarray(image)[:64, 11 : 11 + 96]
    assert np.array_equal(pixels(results / "stream.png"), demo()(frame))


def check_own_checkpoint(results: Path) -> None:
    folder = results / "own_checkpoint"
    result = pixels(folder / "image.png")
    assert np.array_equal(result, upscaled("chelsea.jpg", tinysr_kernels.compile(folder / "checkpoint.safetensors")))
    assert np.array_equal(result, upscaled("chelsea.jpg", tinysr_kernels.compile(folder / "folded.safetensors")))
    info = tinysr_kernels.describe(folder / "checkpoint.safetensors")
    assert (info["family"], info["upscale"], info["config"]["residual"]) == ("tinysr-unet", 4, "bicubic")


def check_diffusers_vae(results: Path) -> None:
    """The example itself compares the images."""
    assert pixels(results / "diffusers_vae" / "image.png").shape == (128, 128, 3)


CHECKS: dict[str, Callable[[Path], None]] = {
    "image.py": check_image,
    "folder.py": check_folder,
    "video.py": check_video,
    "stream.py": check_stream,
    "own_checkpoint.py": check_own_checkpoint,
    "diffusers_vae.py": check_diffusers_vae,
}


LONG = {"diffusers_vae.py"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(path.name, marks=pytest.mark.long if path.name in LONG else ())
        for path in sorted(EXAMPLES.glob("*.py"))
    ],
)
def test_example(name: str, tmp_path: Path) -> None:
    printed = run(name, tmp_path)
    results = tmp_path / "build" / "examples"
    for line in printed.splitlines():
        path, colon, _ = line.partition(": ")
        assert not colon or (tmp_path / path).exists(), f"{name} says that it wrote {path}"
    assert f"build/examples/{Path(name).stem}" in printed
    CHECKS[name](results)


def test_every_example_is_listed() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = [line.split("](")[1].split(")")[0] for line in text.splitlines() if line.startswith("- [")]
    assert sorted(listed) == sorted(CHECKS)
    assert all(line.count("](") == 1 for line in text.splitlines() if line.startswith("- ["))


def test_folder_names_what_it_cannot_read_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 7), "white").save(tmp_path / "in" / "white.png")
    command = [sys.executable, str(EXAMPLES / "folder.py"), "in", "-o", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "broken.png" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["white.png"]
