"""Films and images of one run at another size than the network's, through a compiled model."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from PIL import Image

import tinysr_kernels
from tests.files.test_batch import save
from tests.files.video.films import images, make, times
from tests.runtime.sample_images import noise
from tinysr_kernels.files import batch
from tinysr_kernels.files.batch import Settings
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.runtime.images.scaling import Target

pytest.importorskip("av")


@pytest.mark.parametrize(
    ("target", "film", "picture"),
    [
        (Target(scale=1.5), (24, 18), (12, 9)),
        (Target(size=(20, 22)), (20, 22), (20, 22)),
        (Target(longest=30), (30, 23), (30, 23)),
    ],
    ids=str,
)
def test_films_and_images_get_the_size(
    target: Target, film: tuple[int, int], picture: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / "a.mp4", size=(16, 12), audio=0, count=3)
    save(tmp_path / "in" / "b.png", Image.fromarray(noise(6, 8)))
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out")
    report = StringIO()
    model = tinysr_kernels.compile("demo", device="cpu")
    results = batch.run(jobs, model, Settings(target=target), report=report)
    assert [result.status for result in results] == ["done", "done"], report.getvalue()
    assert [tuple(json.loads(line)["output_size"]) for line in report.getvalue().splitlines()] == [film, picture]
    frames = images(tmp_path / "out" / "a.mp4")
    assert {frame.shape[:2] for frame in frames} == {film[::-1]}
    assert times(tmp_path / "out" / "a.mp4") == times(tmp_path / "in" / "a.mp4")
    with Image.open(tmp_path / "out" / "b.png") as image:
        assert image.size == picture
