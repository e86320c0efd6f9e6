"""Videos: every frame keeps its timestamp, audio is unchanged, gaps are filled and counted, outputs are complete."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.files.video.films import audio, damage, enlarge, images, make, times
from tests.runtime.sample_images import SCALE, FakeModel
from tinysr_kernels.errors import InputError, TinySRError
from tinysr_kernels.files import batch, video
from tinysr_kernels.files.batch import Settings
from tinysr_kernels.files.jobs import plan_jobs
from tinysr_kernels.files.video import output_suffix, upscale_video

av = pytest.importorskip("av")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_timestamps_and_audio_are_kept(tmp_path, suffix):
    source, target = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    make(source)
    report = enlarge(source, target)
    assert report == video.VideoReport(12, 0, (48, 36), (192, 144), 2)
    assert times(target) == times(source)
    assert len(set(np.diff(times(source)))) == 3  # the durations vary
    assert audio(target) == audio(source)
    with av.open(str(target)) as container:
        assert [stream.language for stream in container.streams.audio] == ["eng", "fra"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [source.name, target.name]


def test_every_frame_is_the_right_one(tmp_path):
    make(tmp_path / "a.mp4", audio=0)
    enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4", crf=4)
    for before, after in zip(images(tmp_path / "a.mp4"), images(tmp_path / "b.mp4"), strict=True):
        assert abs(after[2::4, 2::4].astype(int) - before).mean() < 4


@pytest.mark.parametrize("size", [(47, 35), (1, 1), (2, 37)])
def test_odd_sizes(tmp_path, size):
    make(tmp_path / "a.mkv", size=size, codec="ffv1", pixel_format="yuv444p")
    report = enlarge(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert report.output_size == (4 * size[0], 4 * size[1])
    assert images(tmp_path / "b.mp4")[0].shape == (4 * size[1], 4 * size[0], 3)


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize("matrix", [0, 1, 6, 9])
def test_color_matrix_and_range_are_kept(tmp_path, matrix, full_range):
    make(tmp_path / "a.mp4", audio=0, matrix=matrix, full_range=full_range, count=2)
    enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4", crf=1)
    with av.open(str(tmp_path / "a.mp4")) as first, av.open(str(tmp_path / "b.mp4")) as second:
        before, after = next(first.decode(video=0)), next(second.decode(video=0))
        # An untagged small video is BT.601. The output is tagged so, because players would assume BT.709 for its size.
        assert after.colorspace == (matrix or 5)
        assert after.color_range == (2 if full_range else 1)
        if matrix:
            assert second.streams.video[0].codec_context.color_primaries == matrix
        luma = before.to_ndarray()[:36].astype(float), after.to_ndarray()[:144][2::4, 2::4].astype(float)
        assert abs(luma[0] - luma[1]).mean() < 1.5
        assert abs(luma[0].mean() - luma[1].mean()) < 0.5


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_is_applied(tmp_path, rotation):
    if not hasattr(av.video.stream.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV cannot write a rotation")
    make(tmp_path / "a.mp4", audio=0, rotation=rotation, count=2)
    report = enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4")
    assert report.input_size == ((48, 36) if rotation == 180 else (36, 48))
    with av.open(str(tmp_path / "a.mp4")) as first, av.open(str(tmp_path / "b.mp4")) as second:
        before, after = next(first.decode(video=0)), next(second.decode(video=0))
    assert after.rotation == 0
    upright = np.rot90(before.to_ndarray(format="rgb24"), before.rotation // 90)
    shown = after.to_ndarray(format="rgb24")[2::4, 2::4].astype(int)
    assert abs(shown - upright).mean() < 5


@pytest.mark.parametrize("broken", [{5}, {0}, {11}, {3, 4, 5}])
def test_corrupt_frames_are_repeated_and_counted(tmp_path, caplog, broken):
    # PNG frames are independent: each corrupt packet costs exactly one frame.
    make(tmp_path / "whole.mov", codec="png", pixel_format="rgb24")
    damage(tmp_path / "whole.mov", tmp_path / "a.mov", broken)
    report = enlarge(tmp_path / "a.mov", tmp_path / "b.mov", crf=4)
    assert (report.frames, report.repeated) == (12, len(broken))
    assert times(tmp_path / "b.mov") == times(tmp_path / "whole.mov")
    assert audio(tmp_path / "b.mov") == audio(tmp_path / "whole.mov")
    assert f"{len(broken)} corrupt frames were replaced" in caplog.text
    originals, shown = images(tmp_path / "whole.mov"), images(tmp_path / "b.mov")
    good = [index for index in range(12) if index not in broken]
    for index in range(12):
        expected = originals[max([each for each in good if each <= index], default=good[0])]
        assert abs(shown[index][2::4, 2::4].astype(int) - expected).mean() < 6
    with pytest.raises(InputError, match=r"corrupt frame at \d"):
        enlarge(tmp_path / "a.mov", tmp_path / "c.mov", strict=True)
    assert not (tmp_path / "c.mov").exists()


def test_corruption_between_predicted_frames_keeps_timestamps(tmp_path):
    make(tmp_path / "whole.mp4")
    damage(tmp_path / "whole.mp4", tmp_path / "a.mp4", {5})
    report = enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4")
    # The corrupt frame, and the one that the decoder drops because of the error.
    assert (report.frames, report.repeated) == (12, 2)
    assert times(tmp_path / "b.mp4") == times(tmp_path / "whole.mp4")


def test_a_truncated_video_is_kept_up_to_the_error(tmp_path):
    make(tmp_path / "a.mkv", codec="ffv1", audio=1)
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: len(data) // 2])
    report = enlarge(tmp_path / "a.mkv", tmp_path / "b.mkv")
    assert 0 < report.frames < 12
    assert len(images(tmp_path / "b.mkv")) == report.frames


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a readable video"),
        (b"\0\0\0\x20ftypisom" + b"\0" * 200, "not a readable video"),
        (b"text" * 50, "not a readable video"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message):
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(InputError, match=message):
        enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4")
    with pytest.raises(InputError, match="cannot write"):
        enlarge(tmp_path / "a.mp4", tmp_path / "b.avi")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_audio_only_is_refused(tmp_path):
    make(tmp_path / "video.mp4", count=1)
    with av.open(str(tmp_path / "video.mp4")) as first, av.open(str(tmp_path / "a.mp4"), "w") as second:
        stream = second.add_stream_from_template(first.streams.audio[0])
        for packet in first.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                second.mux(packet)
    with pytest.raises(InputError, match="no video stream"):
        enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")])
def test_an_interruption_leaves_no_partial_file(tmp_path, error):
    make(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(b"as it was")

    def stream(frames):
        for index, frame in enumerate(frames):
            if index == 5:
                raise error
            yield frame.repeat(SCALE, 0).repeat(SCALE, 1)

    with pytest.raises(type(error)):
        upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", stream, SCALE)
    assert (tmp_path / "b.mp4").read_bytes() == b"as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "b.mp4"]


def test_missing_frames_raise_an_error(tmp_path):
    make(tmp_path / "a.mp4")

    def stream(frames):
        yield from list(FakeModel().stream(frames))[:-1]

    with pytest.raises(TinySRError, match="expected 12 frames, found 11"):
        upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", stream, SCALE)
    with pytest.raises(TinySRError, match="expected a frame of shape"):
        upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", lambda frames: iter(frames), SCALE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_stream_may_buffer_frames(tmp_path):
    make(tmp_path / "a.mp4")

    def ahead(frames):
        held = []
        for frame in frames:
            held.append(frame.repeat(SCALE, 0).repeat(SCALE, 1))
            if len(held) > 3:
                yield held.pop(0)
        yield from held

    report = upscale_video(tmp_path / "a.mp4", tmp_path / "b.mp4", ahead, SCALE)
    assert report.frames == 12
    assert times(tmp_path / "b.mp4") == times(tmp_path / "a.mp4")


def test_other_codecs(tmp_path, monkeypatch):
    make(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4")
    with av.open(str(tmp_path / "b.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    assert times(tmp_path / "b.mp4") == times(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "codecs_available", {"h263"})
    with pytest.raises(InputError, match="no encoder libx264 or mpeg4"):
        enlarge(tmp_path / "a.mp4", tmp_path / "c.mp4")


def test_webm(tmp_path):
    if "libvpx-vp9" not in av.codecs_available:
        pytest.skip("this PyAV lacks VP9")
    make(tmp_path / "a.webm", codec="libvpx-vp9", audio=0, count=4)
    assert enlarge(tmp_path / "a.webm", tmp_path / "b.webm").frames == 4
    make(tmp_path / "a.mp4", count=2)
    with pytest.raises(InputError, match=r"audio cannot be copied.*\.mkv"):
        enlarge(tmp_path / "a.mp4", tmp_path / "c.webm")


def test_subtitles_are_copied_or_dropped_with_a_notice(tmp_path, caplog):
    make(tmp_path / "video.mkv", count=3, audio=1)
    (tmp_path / "a.srt").write_text("1\n00:00:00,000 --> 00:00:00,100\nHello\n")
    with (
        av.open(str(tmp_path / "video.mkv")) as video_file,
        av.open(str(tmp_path / "a.srt")) as text,
        av.open(str(tmp_path / "a.mkv"), "w") as output,
    ):
        streams = [*video_file.streams, text.streams.subtitles[0]]
        copies = {id(stream): output.add_stream_from_template(stream) for stream in streams}
        for packet in [*text.demux(), *video_file.demux()]:
            if packet.size:
                packet.stream = copies[id(packet.stream)]
                output.mux(packet)
    enlarge(tmp_path / "a.mkv", tmp_path / "b.mkv")
    with av.open(str(tmp_path / "b.mkv")) as container:
        (packet,) = (each for each in container.demux(subtitles=0) if each.size)
        assert b"Hello" in bytes(packet)
    assert caplog.text == ""
    enlarge(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert "subtitle stream dropped" in caplog.text


def test_missing_pyav_names_the_install_command(tmp_path, monkeypatch):
    make(tmp_path / "a.mp4", count=1)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(InputError, match=r"tinysr-kernels\[video\]"):
        enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4")


def test_videos_in_a_run(tmp_path):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in" / "a.mp4")
    (tmp_path / "in" / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    jobs = plan_jobs([tmp_path / "in"], tmp_path / "out")
    results = batch.run(jobs, FakeModel(), Settings(strict=False))
    assert [result.status for result in results] == ["done", "failed"]
    assert results[0].frames == 12
    assert results[0].output_size == (192, 144)
    (wrong,) = plan_jobs([tmp_path / "in" / "a.mp4"], tmp_path / "a.png")
    assert "a video cannot be written to a.png" in wrong.problem


def test_the_suffix_of_a_result(tmp_path):
    """A film's own if such a file can be written and holds its sound."""
    make(tmp_path / "a.mp4", count=2)
    make(tmp_path / "a.avi", codec="mpeg4", audio=0, count=2)
    (tmp_path / "a.mp4").rename(tmp_path / "a.webm")  # with AAC, which WebM does not allow
    make(tmp_path / "a.MOV", count=2, form="mov")
    names = {"a.webm": ".mkv", "a.avi": ".mkv", "a.MOV": ".MOV", "missing.mp4": ".mp4", "missing.wmv": ".mkv"}
    assert {name: output_suffix(tmp_path / name) for name in names} == names
