"""Folders with several workers: the same files as sequentially, also if some of them fail."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import tinysr_kernels
from tests.files.runs import Failing, contents, fill, save, three, written
from tests.files.runs import run as run_all
from tests.runtime.device.recorder import Recorder
from tests.runtime.device.test_graphed_model import recorder  # noqa: F401  (a fixture)
from tests.runtime.sample_images import FakeModel, noise, sample_image
from tinysr_kernels.errors import NonFiniteOutput
from tinysr_kernels.files import batch
from tinysr_kernels.files.batch import Result, Settings
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.runtime.notices import notice


def without_times(results: list[Result], folder: Path) -> list[dict[str, object]]:
    rows = [dataclasses.asdict(result) | {"seconds": 0} for result in results]
    for row in rows:
        row["output"] = row["output"] and Path(str(row["output"])).relative_to(folder)
    return rows


def test_several_workers_give_the_same_files(tmp_path):
    fill(tmp_path / "in")
    report = io.StringIO()
    alone = run_all([tmp_path / "in"], tmp_path / "alone")
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "together")
    seen: list[Result] = []
    together = batch.run(jobs, FakeModel(), Settings(workers=4), report=report, on_result=seen.append)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    assert without_times(together, tmp_path / "together") == without_times(alone, tmp_path / "alone")
    assert seen == together
    assert [json.loads(line)["input"] for line in report.getvalue().splitlines()] == [each.input for each in alone]


class WaitingModel(FakeModel):
    """A network whose first two calls wait until most other images have been read and are queued."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.read: list[int] = []

    def enlarge(self, rgb: Tensor) -> Tensor:
        self.batches.append(len(rgb))
        end = time.monotonic() + 120
        while len(self.batches) <= 2 and len(self.read) < 8 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        notice(f"seen {rgb.shape[-1]} wide")
        return super().enlarge(rgb)


def test_images_of_equal_shape_share_batches(tmp_path, monkeypatch):
    for i in range(12):
        save(tmp_path / "in" / f"{i:02}.png", sample_image("RGB", 5 if i % 3 else 7, 4, seed=i))
    model = WaitingModel()
    upscale = batch.upscale_image_file

    def counted(*args, **options):
        model.read.append(1)
        return upscale(*args, **options)

    monkeypatch.setattr(batch, "upscale_image_file", counted)
    results = run_all([tmp_path / "in"], tmp_path / "out", Settings(workers=8), model)
    assert [result.status for result in results] == ["done"] * 12
    assert sum(model.batches) == 12
    assert max(model.batches) > 1
    for i, result in enumerate(results):
        assert result.notices == [f"seen {5 if i % 3 else 7} wide"]
    run_all([tmp_path / "in"], tmp_path / "alone")
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_compiled_model_gives_the_same_files(tmp_path, recorder: Recorder):  # noqa: F811
    """With graphs, batches and three threads, against sequential processing without them."""
    model = tinysr_kernels.compile("demo", device="cpu")
    for i in range(6):
        save(tmp_path / "in" / f"{i}.png", Image.fromarray(noise(9, 12, 4 if i == 3 else 3, seed=i)))
    together = run_all([tmp_path / "in"], tmp_path / "together", Settings(workers=3), model)
    assert [result.status for result in together] == ["done"] * 6
    plain = tinysr_kernels.compile("demo", device="cpu", cuda_graphs=False)
    run_all([tmp_path / "in"], tmp_path / "alone", None, plain)
    for name in contents(tmp_path / "alone"):
        pixels = [np.asarray(Image.open(tmp_path / folder / name)) for folder in ("alone", "together")]
        assert np.array_equal(*pixels)


@pytest.mark.parametrize("error", [NonFiniteOutput("NaN"), ValueError("surprise"), MemoryError()])
def test_one_failure_never_stops_the_others(tmp_path, error):
    results = run_all([three(tmp_path / "in")], tmp_path / "out", Settings(workers=3), Failing(error))
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert results[1].error["type"] == ("OutOfMemory" if isinstance(error, MemoryError) else type(error).__name__)
    assert written(tmp_path / "out") == ["a.png", "c.png"]


def test_strict_runs_sequentially(tmp_path):
    model = Failing(ValueError("x"))
    results = run_all([three(tmp_path / "in")], tmp_path / "out", Settings(strict=True, workers=4), model)
    assert [result.status for result in results] == ["done", "failed"]
    assert model.calls == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interruption_ends_all_workers_and_leaves_no_partial_file(tmp_path, error):
    for i in range(12):
        save(tmp_path / "in" / f"{i:02}.png", sample_image("RGB", 2 if i == 4 else 3, 3, seed=i))
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out")
    report = io.StringIO()
    with pytest.raises(type(error)):
        batch.run(jobs, Failing(error), Settings(workers=3), report=report)
    lines = [json.loads(line) for line in report.getvalue().splitlines()]
    assert [line["status"] for line in lines] == ["done"] * 4 + ["interrupted"]
    assert lines[-1]["input"].endswith("04.png")
    assert lines[-1]["output"] is None
    assert not any(thread.name.startswith("tinysr") for thread in threading.enumerate())
    for name in written(tmp_path / "out"):
        assert name.endswith(".png")
        Image.open(tmp_path / "out" / name).load()
    results = run_all([tmp_path / "in"], tmp_path / "out", Settings(skip_existing=True, workers=3))
    assert {result.status for result in results} == {"skipped", "done"}
    assert len(written(tmp_path / "out")) == 12


def test_the_pixels_in_flight_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "DEVICE_PIXELS", 3 * 20)
    for i in range(8):
        save(tmp_path / "in" / f"{i}.png", sample_image("RGB", 5, 4, seed=i))
    now, most, lock = [0], [0], threading.Lock()

    class Counting(FakeModel):
        def enlarge(self, rgb: Tensor) -> Tensor:
            with lock:
                now[0] += len(rgb)
                most[0] = max(most[0], now[0])
            time.sleep(0.01)
            with lock:
                now[0] -= len(rgb)
            return super().enlarge(rgb)

    results = run_all([tmp_path / "in"], tmp_path / "out", Settings(workers=8), Counting())
    assert [result.status for result in results] == ["done"] * 8
    assert most[0] <= 3


def test_the_number_of_workers():
    model = FakeModel()
    assert batch._workers(model, Settings()) == 1
    assert batch._workers(model, Settings(workers=5)) == 5
    assert batch._workers(None, Settings(workers=5)) == 1
    model.device = torch.device("cuda", 0)
    assert 1 <= batch._workers(model, Settings()) <= batch.GPU_WORKERS
    assert batch._workers(model, Settings(strict=True)) == 1
