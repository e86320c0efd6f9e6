"""Videos with frames that fail in the network, and the threads that decode and encode."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.files.video.films import enlarge, images, make, times
from tests.runtime.sample_images import SCALE
from tinysr_kernels.errors import NonFiniteOutput, OutOfMemory
from tinysr_kernels.files import batch
from tinysr_kernels.files.batch import Settings
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.files.video import upscale_video
from tinysr_kernels.files.video.color import Converter
from tinysr_kernels.runtime.streaming import in_order


@pytest.mark.parametrize("failing", [{3}, {0}, {11}, {4, 5, 6}, {0, 11}])
def test_failed_frames_are_replaced_and_counted(tmp_path, caplog, failing):
    make(tmp_path / "a.mp4")

    def stream(frames):
        for index, frame in enumerate(frames):
            yield NonFiniteOutput("NaN") if index in failing else frame.repeat(SCALE, 0).repeat(SCALE, 1)

    report = upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", stream, SCALE, crf=4)
    assert (report.frames, report.repeated) == (12, len(failing))
    assert times(tmp_path / "b.mp4") == times(tmp_path / "a.mp4")
    assert f"{len(failing)} frames were not finite in any dtype" in caplog.text
    assert "corrupt" not in caplog.text
    before, after = images(tmp_path / "a.mp4"), images(tmp_path / "b.mp4")
    good = [index for index in range(12) if index not in failing]
    for index, shown in enumerate(after):
        expected = before[max([each for each in good if each <= index], default=good[0])]
        assert abs(shown[2::4, 2::4].astype(int) - expected).mean() < 6


@pytest.mark.parametrize(("failing", "error"), [(range(12), NonFiniteOutput("NaN")), ({3}, OutOfMemory("full"))])
def test_a_video_without_a_good_frame_or_with_another_error_fails(tmp_path, failing, error):
    make(tmp_path / "a.mp4")

    def stream(frames):
        for index, frame in enumerate(frames):
            yield error if index in failing else frame.repeat(SCALE, 0).repeat(SCALE, 1)

    with pytest.raises(type(error)):
        upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", stream, SCALE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_the_encoder_has_its_own_thread(tmp_path, monkeypatch):
    """The caller's thread decodes frames and consumes results; one other thread does all writing."""
    make(tmp_path / "a.mp4", audio=1)
    reading, writing = set(), set()
    to_rgb, to_yuv = Converter.to_rgb, Converter.to_yuv

    def read(self, frame):
        reading.add(threading.get_ident())
        return to_rgb(self, frame)

    def write(self, *rest):
        writing.add(threading.get_ident())
        return to_yuv(self, *rest)

    monkeypatch.setattr(Converter, "to_rgb", read)
    monkeypatch.setattr(Converter, "to_yuv", write)
    enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert reading == {threading.get_ident()}
    assert len(writing) == 1
    assert reading.isdisjoint(writing)


class FailsOnThirdFrame:
    """A model that fails on its third frame."""

    def __init__(self) -> None:
        self.upscale = SCALE
        self.device = torch.device("cpu")

    def enlarge(self, rgb: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a video is streamed")

    def stream(self, frames, *, on_error="raise"):
        def work(item):
            index, frame = item
            if index == 2:
                raise NonFiniteOutput("NaN in every precision")
            return frame.repeat(SCALE, 0).repeat(SCALE, 1)

        return in_order(work, enumerate(frames), workers=2, ahead=3, on_error=on_error)


@pytest.mark.parametrize("strict", [False, True])
def test_a_failed_frame_fails_the_video_only_if_strict(tmp_path, strict):
    make(tmp_path / "a.mp4")
    (result,) = batch.run(
        plan_jobs([tmp_path / "a.mp4"], tmp_path / "b.mp4"), FailsOnThirdFrame(), Settings(strict=strict)
    )
    assert result.status == ("failed" if strict else "done")
    if strict:
        assert result.error["type"] == "NonFiniteOutput"
    else:
        assert (result.frames, times(tmp_path / "b.mp4")) == (12, times(tmp_path / "a.mp4"))
        assert any("1 frames were not finite" in message for message in result.notices)
