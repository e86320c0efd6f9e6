"""Films that end before what their header states are noticed, with numbers; whole films never are."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.files.video.films import damage, enlarge, make
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.video.stated_size import stated_size
from tinysr_kernels.files.video.survey import survey_film

av = pytest.importorskip("av")

FILMS = [
    *((".mkv", "ffv1", 0), (".mkv", "libx264", 2), (".webm", "libvpx-vp9", 0), (".avi", "mpeg4", 0)),
    *((".mp4", "libx264", 1), (".mov", "png", 0), (".flv", "flv", 0), (".wmv", "wmv2", 0), (".nut", "ffv1", 0)),
    *((".ts", "libx264", 0), (".ogv", "libvpx", 0), (".3gp", "mpeg4", 0), (".ivf", "libvpx-vp9", 0)),
]
SHORTER = [(".mkv", "ffv1"), (".webm", "libvpx-vp9"), (".avi", "mpeg4"), (".flv", "flv"), (".wmv", "wmv2")]


@pytest.mark.parametrize(("suffix", "codec", "sounds"), FILMS)
@pytest.mark.parametrize("count", [1, 14])
def test_whole_films_are_whole(tmp_path, suffix, codec, sounds, count):
    """Frames of various durations; the sound is shorter or longer than the film."""
    path = tmp_path / f"a{suffix}"
    make(path, codec=codec, audio=sounds, count=count, pixel_format="rgb24" if codec == "png" else "yuv420p")
    survey = survey_film(path)
    assert (survey.frames, survey.cut_off) == (count, None)
    if sounds == 0 and suffix in (".mkv", ".avi", ".mov", ".wmv", ".webm", ".3gp"):
        with open(path, "rb") as file:
            assert stated_size(file) == path.stat().st_size


def cut(path: Path, part: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])


@pytest.mark.parametrize(("suffix", "codec"), SHORTER)
def test_a_film_that_is_cut_off(tmp_path, caplog, suffix, codec):
    path, target = tmp_path / f"a{suffix}", tmp_path / "b.mkv"
    make(path, codec=codec, audio=0, count=40, size=(96, 72))
    cut(path, 0.6)
    survey = survey_film(path)
    assert survey.cut_off is not None
    with pytest.raises(InputError, match=r"the film is cut off: .*\d+ .*without --strict"):
        enlarge(path, target, strict=True)
    assert not target.exists()
    report = enlarge(path, target)
    assert report.frames == survey.frames
    assert caplog.text.count("the film is cut off: ") == 1
    assert "frames" in caplog.text


def test_numbers_of_frames_and_seconds(tmp_path):
    make(tmp_path / "a.mkv", codec="ffv1", audio=0, count=40)
    cut(tmp_path / "a.mkv", 0.6)
    survey = survey_film(tmp_path / "a.mkv")
    assert survey.frames in range(20, 28)
    assert survey.cut_off is not None
    assert f"{survey.frames} of about 4" in survey.cut_off
    assert "of 3.16 seconds" in survey.cut_off


def test_an_index_of_more_frames_than_there_are(tmp_path):
    """MP4 with its index first, as for streaming: the index is whole."""
    make(tmp_path / "tail.mp4", audio=0, count=30)
    with (
        av.open(str(tmp_path / "tail.mp4")) as source,
        av.open(str(tmp_path / "a.mp4"), "w", container_options={"movflags": "faststart"}) as output,
    ):
        copy = output.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = copy
                output.mux(packet)
    whole = survey_film(tmp_path / "a.mp4")
    assert (whole.frames, whole.cut_off) == (30, None)
    cut(tmp_path / "a.mp4", 0.7)
    survey = survey_film(tmp_path / "a.mp4")
    assert survey.cut_off is not None
    assert f"{survey.frames} of 30 frames" in survey.cut_off


def test_the_rest_of_a_download_that_was_allocated_first(tmp_path):
    """The file has its full size, but its second half is zeros."""
    make(tmp_path / "a.mkv", codec="ffv1", audio=0, count=40)
    data = (tmp_path / "a.mkv").read_bytes()
    half = len(data) // 2
    (tmp_path / "a.mkv").write_bytes(data[:half] + bytes(len(data) - half))
    assert "seconds" in (survey_film(tmp_path / "a.mkv").cut_off or "")


def test_edit_lists_are_no_loss(tmp_path):
    """Hidden frames before the first one shown are listed, read, and not counted."""
    make(tmp_path / "whole.mp4", audio=1, count=20)
    with av.open(str(tmp_path / "whole.mp4")) as source, av.open(str(tmp_path / "a.mp4"), "w") as output:
        copies = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
        for packet in source.demux():
            if packet.size:
                if packet.stream.type == "video":
                    packet.pts -= 2048
                    packet.dts -= 2048
                packet.stream = copies[packet.stream.index]
                output.mux(packet)
    survey = survey_film(tmp_path / "a.mp4")
    assert survey.cut_off is None
    assert survey.frames == enlarge(tmp_path / "a.mp4", tmp_path / "b.mp4").frames < 20


def test_corrupt_frames_are_no_loss(tmp_path):
    make(tmp_path / "whole.mkv", codec="ffv1", audio=0, count=12)
    damage(tmp_path / "whole.mkv", tmp_path / "a.mkv", {3, 11})
    assert survey_film(tmp_path / "a.mkv").cut_off is None


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", None),
        (b"RIFF", 0),
        (b"RIFF\x10\0\0\0AVI ", 24),
        (b"RIFF\x10\0\0\0AVI " + bytes(4), 16),  # as by programs that count the head, too
        (b"RIFF\0\0\0\0AVI ", None),
        (struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4s", 100, b"mdat"), 108),
        (struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4sQ", 1, b"mdat", 1 << 40), 8 + (1 << 40)),
        (struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4s", 0, b"mdat") + bytes(50), 66),
        (struct.pack(">I4s", 8, b"ftyp") + struct.pack(">I4s", 3, b"mdat") + bytes(50), None),
        (b"\x1aE\xdf\xa3\x80\x18S\x80g\xff", None),  # a segment of unknown size, as of a live stream
        (b"\x1aE\xdf\xa3\x80\x18S\x80g\x8a", 20),
        (b"\x1aE\xdf\xa3\x8a", 15),
        (b"\x1aE\xdf\xa3", None),
        (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11\xa6\xd9\x00\xaa\x00\x62\xce\x6c", None),
        (b"G" + bytes(187), None),
    ],
)
def test_stated_sizes(tmp_path, data, expected):
    (tmp_path / "x").write_bytes(data)
    with open(tmp_path / "x", "rb") as file:
        assert stated_size(file) == expected
