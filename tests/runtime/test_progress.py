"""Progress between tiles, and ending a call there: by what the callback raises, by Ctrl-C, by closing a stream."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.files.test_batch import save
from tests.runtime.device.recorder import Recorder
from tests.runtime.sample_images import noise
from tests.runtime.test_runner import photo, running, unet
from tinysr_kernels.files import batch
from tinysr_kernels.files.batch import Settings
from tinysr_kernels.files.jobs import Job, plan_jobs
from tinysr_kernels.nets import Network
from tinysr_kernels.nets.unet_sr import UNetSR
from tinysr_kernels.runtime.micro_batch import MicroBatcher, Stopped
from tinysr_kernels.runtime.tiles.limits import Limits
from tinysr_kernels.runtime.tiles.tiled_inference import pieces


@pytest.fixture(scope="module")
def small() -> Network:
    return unet(torch.float32)


@pytest.fixture(scope="module")
def demo() -> tinysr_kernels.CompiledSR:
    return tinysr_kernels.compile("demo", device="cpu", tile=16)


class Enough(Exception):
    """Raised by a callback."""


def test_progress_counts_tiles_up_to_the_total(demo: tinysr_kernels.CompiledSR) -> None:
    tiles = pieces(demo.network, 40, 26, 4, demo._runner.limits)
    assert tiles > 4
    for image, total in (
        (noise(40, 26), tiles),
        (noise(40, 26, 4), tiles),  # by way of floats, for alpha
        (np.stack([noise(40, 26)] * 2), 2 * tiles),
        (np.stack([noise(8, 8)] * 3), 3),  # images in one piece
        (noise(16, 16), 1),
    ):
        seen: list[tuple[int, int]] = []
        found = demo(image, progress=lambda *step, seen=seen: seen.append(step))
        assert seen == [(done, total) for done in range(1, total + 1)]
        assert np.array_equal(found, demo(image))


@pytest.mark.parametrize("engine", [None, Recorder()], ids=["eager", "graphs"])
def test_what_progress_raises_ends_the_call_and_nothing_else(small: Network, engine: Recorder | None) -> None:
    lr = photo(40, 40)
    model = running(small, engine, Limits(tile=16))
    expected = model(lr)
    for error in (Enough, KeyboardInterrupt, SystemExit, MemoryError):
        done: list[int] = []

        def stop(at: int, total: int, done: list[int] = done, error: type[BaseException] = error) -> None:
            done.append(at)
            if at == 2:
                raise error

        with pytest.raises(error):
            model(lr, progress=stop)
        assert done == [1, 2]
        free: list[bool] = []
        thread = threading.Thread(target=lambda free=free: free.append(torch.equal(model(lr), expected)))
        thread.start()
        thread.join(60)
        assert free == [True]


def test_the_callback_runs_in_the_caller_s_mode(demo: tinysr_kernels.CompiledSR) -> None:
    modes: list[bool] = []
    demo(noise(20, 16), progress=lambda *_: modes.append(torch.is_inference_mode_enabled()))
    assert set(modes) == {False}


def test_what_is_no_callback_is_named(demo: tinysr_kernels.CompiledSR) -> None:
    with pytest.raises(tinysr_kernels.InputError, match=r"callable as progress\(done, total\), found int"):
        demo(noise(4, 4), progress=3)


def test_ctrl_c_is_answered_between_tiles(demo: tinysr_kernels.CompiledSR) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    seen: list[int] = []

    def press(done: int, _total: int) -> None:
        seen.append(done)
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            demo(noise(60, 60), progress=press)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(seen) <= 2
    assert np.array_equal(demo(noise(16, 16)), demo(noise(16, 16)))


def test_closing_a_stream_ends_the_frame_under_way(
    demo: tinysr_kernels.CompiledSR, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls, second = UNetSR.forward, list[int](), threading.Event()
    closing = threading.Event()

    def counted(self: UNetSR, x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:  # the first tile of the second frame
            second.set()
            closing.wait(60)
        return forward(self, x)

    monkeypatch.setattr(UNetSR, "forward", counted)
    results = demo.stream([noise(16, 16), noise(60, 60)])
    next(results)
    assert second.wait(60)
    timer = threading.Timer(0.2, closing.set)  # `close` has told the frame to end by then
    timer.start()
    results.close()
    timer.join()
    assert len(calls) == 2


def test_a_batch_of_requests_reports_to_each_and_stops_between_tiles() -> None:
    steps = threading.Event()

    def enlarge(rgb: Tensor, *, progress: object) -> Tensor:
        for done in (1, 2, 3):
            progress(done, 3)  # type: ignore[operator]
            steps.set()
        return rgb

    batcher = MicroBatcher(enlarge, 1 << 20)
    seen: list[tuple[int, int]] = []
    images = torch.zeros(1, 3, 2, 2)
    assert torch.equal(batcher(images, progress=lambda *step: seen.append(step)), images)
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done: int, total: int) -> None:
        batcher.stop()

    with pytest.raises(Stopped):
        batcher(images, progress=stop)


def test_a_run_reports_the_tiles_of_its_images(demo: tinysr_kernels.CompiledSR, tmp_path: Path) -> None:
    from PIL import Image

    for name, side in (("a.png", 24), ("b.png", 8)):
        save(tmp_path / "in" / name, Image.fromarray(noise(side, 24)))
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out")
    for workers in (1, 2):
        seen: list[tuple[str, int, int]] = []

        def on_progress(job: Job, done: int, total: int, seen: list[tuple[str, int, int]] = seen) -> None:
            seen.append((job.source.name, done, total))

        results = batch.run(jobs, demo, Settings(workers=workers), on_progress=on_progress)
        assert [result.status for result in results] == ["done", "done"]
        assert sorted(seen) == [*(("a.png", i, 4) for i in (1, 2, 3, 4)), ("b.png", 1, 2), ("b.png", 2, 2)]
