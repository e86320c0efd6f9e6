"""An interrupted film goes on at its last complete segment, with the same bytes as in one run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import ROOT
from tests.files.video.films import damage, make, repeat
from tests.runtime.sample_images import SCALE
from tinysr_kernels.errors import InputError, OutOfMemory
from tinysr_kernels.files.video import segments, upscale_video

pytest.importorskip("av")


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    monkeypatch.setattr(segments, "FRAMES", 4)


class Counting:
    """A stream that counts its frames, changes them by `gain`, and is interrupted after `until` frames."""

    def __init__(self, until: int = 1000, gain: int = 0, error: BaseException | None = None) -> None:
        self.until, self.gain, self.frames = until, gain, 0
        self.error = error or KeyboardInterrupt()

    def __call__(self, frames):
        for frame in repeat(frames):
            self.frames += 1
            yield frame if not self.gain else frame // 2
            if self.frames == self.until:
                time.sleep(0.2)  # until the encoder thread has caught up
                raise self.error


def work_folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(segments.SUFFIX)]


def interrupt(folder: Path, source: str, target: str, until: int = 11, **options) -> None:
    with pytest.raises(KeyboardInterrupt):
        upscale_video(folder / source, folder / target, Counting(until), SCALE, **options)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_a_resumed_film_has_the_same_bytes(tmp_path, caplog, suffix):
    make(tmp_path / f"a{suffix}", count=18)
    (tmp_path / "once").mkdir()
    once, twice = tmp_path / "once" / f"b{suffix}", tmp_path / f"b{suffix}"
    upscale_video(tmp_path / f"a{suffix}", once, repeat, SCALE)
    interrupt(tmp_path, f"a{suffix}", twice.name)
    assert not twice.exists()
    (work,) = work_folders(tmp_path)
    assert work.name.startswith(f".b{suffix}.")
    seen: list[tuple[int, int | None]] = []
    stream = Counting()
    report = upscale_video(tmp_path / f"a{suffix}", twice, stream, SCALE, progress=lambda *done: seen.append(done))
    # 8 frames were complete, or 4 if the encoder was behind; the last one goes through the network again, to compare.
    assert report.frames == 18
    assert stream.frames in (11, 15)
    there = 19 - stream.frames
    assert seen == [(number, 18) for number in range(there + 1, 19)]
    assert f"{there} frames were there from an interrupted run" in caplog.text
    assert not work_folders(tmp_path)
    if suffix != ".mkv":  # Matroska files hold random identities
        assert twice.read_bytes() == once.read_bytes()
    assert _content(twice) == _content(once)


def _content(path: Path) -> list[tuple]:
    import av

    with av.open(str(path)) as container:
        return [(p.stream.index, p.pts, p.dts, p.duration, bytes(p)) for p in container.demux() if p.size]


def test_progress_counts_frames(tmp_path):
    make(tmp_path / "a.mkv", count=6)
    seen: list[tuple[int, int | None]] = []
    upscale_video(tmp_path / "a.mkv", tmp_path / "b.mkv", repeat, SCALE, progress=lambda *done: seen.append(done))
    assert seen == [(number, 6) for number in range(1, 7)]


def test_several_interruptions(tmp_path):
    make(tmp_path / "a.mp4", count=18)
    for frames in (5, 6, 2, 6):  # each run after the first begins with a frame that is there
        interrupt(tmp_path, "a.mp4", "b.mp4", frames)
    stream = Counting()
    assert upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", stream, SCALE).frames == 18
    assert stream.frames < 12


@pytest.mark.parametrize("change", ["source", "crf", "scale", "network", "manifest", "segment", "target"])
def test_segments_of_something_else_are_not_used(tmp_path, change):
    make(tmp_path / "a.mp4", count=14, audio=0)
    interrupt(tmp_path, "a.mp4", "b.mp4")
    (work,) = work_folders(tmp_path)
    stream, options, scale, target = Counting(), {}, SCALE, "b.mp4"
    if change == "source":
        os.utime(tmp_path / "a.mp4", ns=(1, 1))
    elif change == "crf":
        options["crf"] = 30
    elif change == "scale":
        scale = SCALE * 2
        stream = lambda frames: (frame.repeat(8, 0).repeat(8, 1) for frame in frames)  # noqa: E731
    elif change == "network":
        stream = Counting(gain=1)
    elif change == "manifest":
        (work / "manifest.json").write_text("[]")
    elif change == "segment":
        (work / "000000.packets").write_bytes(b"")  # the one that is always complete
    else:
        target = "c.mp4"
    upscale_video(tmp_path / "a.mp4", tmp_path / target, stream, scale, **options)
    if isinstance(stream, Counting):
        # The changed network is noticed by its result for one frame.
        assert stream.frames == (15 if change == "network" else 14)
    assert len(work_folders(tmp_path)) == (1 if change == "target" else 0)


def test_an_error_that_would_come_again_leaves_nothing(tmp_path):
    make(tmp_path / "a.mp4", count=14)
    for error, kept in ((InputError("x"), 0), (OSError(28, "full"), 1), (OutOfMemory("x"), 1), (ValueError("x"), 1)):
        target = tmp_path / type(error).__name__ / "b.mp4"
        target.parent.mkdir()
        with pytest.raises(type(error)):
            upscale_video(tmp_path / "a.mp4", target, Counting(11, error=error), SCALE)
        assert [path.suffix for path in target.parent.iterdir()] == [segments.SUFFIX] * kept


def test_a_folder_in_use_is_left_alone(tmp_path):
    """Two runs with one target: the second one has a folder of its own."""
    make(tmp_path / "a.mp4", count=14)
    inner = Counting()

    def outer(frames):
        for number, frame in enumerate(repeat(frames)):
            if number == 10:
                upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", inner, SCALE)
                assert len(work_folders(tmp_path)) == 1
            yield frame

    assert upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", outer, SCALE).frames == 14
    assert inner.frames == 14
    assert not work_folders(tmp_path)


def test_gaps_beside_a_segment_border(tmp_path):
    """A resumed film repeats the frame before the border as one run would."""
    make(tmp_path / "whole.mov", codec="png", pixel_format="rgb24", count=14, audio=0)
    damage(tmp_path / "whole.mov", tmp_path / "a.mov", {0, 3, 4, 7, 8, 9})
    upscale_video(tmp_path / "a.mov", tmp_path / "once.mov", repeat, SCALE)
    interrupt(tmp_path, "a.mov", "b.mov", 6)
    assert work_folders(tmp_path)
    report = upscale_video(tmp_path / "a.mov", tmp_path / "b.mov", repeat, SCALE)
    assert (report.frames, report.repeated) == (14, 6)
    assert (tmp_path / "b.mov").read_bytes() == (tmp_path / "once.mov").read_bytes()


SCRIPT = """
import sys, time
from pathlib import Path
from tests.files.video.films import repeat
from tinysr_kernels.files.video import segments, upscale_video
segments.FRAMES = 4
def slow(frames):
    for frame in repeat(frames):
        time.sleep(0.05)
        yield frame
upscale_video(sys.argv[1], sys.argv[2], slow, 4)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_run_leaves_no_partial_result_and_is_resumed(tmp_path):
    make(tmp_path / "a.mp4", count=40, audio=0)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]
    with subprocess.Popen(command, cwd=ROOT) as process:
        for _ in range(3000):
            manifests = [path / "manifest.json" for path in work_folders(tmp_path)]
            if any(path.exists() and json.loads(path.read_text())["segments"] for path in manifests):
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "b.mp4").exists()
    stream = Counting()
    assert upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", stream, SCALE).frames == 40
    assert stream.frames <= 37
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]
