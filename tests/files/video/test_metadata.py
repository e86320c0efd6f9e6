"""Tags, languages, flags, chapters, covers and attachments of films: kept where the container can, else one notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.files.video.films import NAMES, enlarge, make
from tinysr_kernels.files.video.metadata import container_tags, flags, kept_tags, lost_tags
from tinysr_kernels.files.video.opening import opened

av = pytest.importorskip("av")

PLACE = "+47.3769+008.5417/"
TAGS = {
    "title": "A film",
    "make": "Maker",
    "model": "Model",
    "location": PLACE,
    "creation_time": "2021-05-06T07:08:09.000000Z",
}
APPLE = {
    "com.apple.quicktime.make": "Apple",
    "com.apple.quicktime.location.ISO6709": PLACE,
    "com.apple.quicktime.creationdate": "2021-05-06T09:08:09+0200",
}


def film(path: Path, tags: dict[str, str], track_tags: dict[str, str] | None = None, **options: Any) -> None:
    """A film with tags, two sound tracks with languages, titles and flags."""
    disposition = av.stream.Disposition
    with open(path, "wb") as file, av.open(file, "w", format=NAMES[path.suffix], **options) as output:
        stream = output.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 36, "yuv420p"
        stream.metadata.update({"language": "ger", "title": "Main"})
        stream.disposition = disposition.default
        tracks = [output.add_stream("aac", rate=44100) for _ in range(2)]
        for track, language, flag in zip(
            tracks, ("eng", "fre"), (disposition.default, disposition.forced), strict=True
        ):
            track.metadata.update({"language": language, "title": f"Track {language}", **(track_tags or {})})
            track.disposition = flag
        output.metadata.update(tags)
        for index in range(4):
            frame = av.VideoFrame.from_ndarray(np.full((36, 48, 3), 20 * index, np.uint8), format="rgb24")
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        for track in tracks:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate, sound.pts = 44100, 0
            output.mux(track.encode(sound))
            output.mux(track.encode(None))


def tags_of(path: Path) -> dict[str, str]:
    with opened(path) as container:
        return {key.lower(): value for key, value in container.metadata.items()}


@pytest.mark.parametrize(
    ("source", "target", "tags"),
    [
        (".mov", ".mov", TAGS),
        (".mov", ".mov", APPLE),
        (".mov", ".mov", TAGS | APPLE),
        (".mov", ".mp4", TAGS),
        (".mov", ".mkv", TAGS | APPLE),
        (".mkv", ".mkv", TAGS | {"custom": "ä"}),
        (".mp4", ".mp4", TAGS),
        (".mkv", ".mp4", TAGS),
        (".mov", ".mp4", APPLE),
    ],
)
def test_tags_are_kept(tmp_path, caplog, source, target, tags):
    options = {"container_options": {"movflags": "use_metadata_tags"}} if source != ".mkv" and tags != TAGS else {}
    film(tmp_path / f"a{source}", tags, **options)
    before = tags_of(tmp_path / f"a{source}")
    enlarge(tmp_path / f"a{source}", tmp_path / f"b{target}")
    after = tags_of(tmp_path / f"b{target}")
    for key in tags:
        if key in before and key != "location":
            assert after.get(key, "")[:19] == before[key][:19], key
    if "location" in before:
        known = "location" if target == ".mkv" else "com.apple.quicktime.location.iso6709"
        assert after.get("location" if target == source == ".mov" and tags == TAGS else known) == PLACE
    assert "cannot hold" not in caplog.text


@pytest.mark.parametrize("source", [".mkv", ".mov"])
def test_languages_titles_and_flags(tmp_path, caplog, source):
    film(tmp_path / f"a{source}", {})
    enlarge(tmp_path / f"a{source}", tmp_path / f"b{source}")
    with opened(tmp_path / f"a{source}") as first, opened(tmp_path / f"b{source}") as second:
        for before, after in zip(first.streams, second.streams, strict=True):
            assert after.language == before.language
            assert flags(after) == flags(before)
            for key in ("title", "name"):
                assert after.metadata.get(key) == before.metadata.get(key)
    assert "cannot hold" not in caplog.text


def test_what_a_container_cannot_hold_is_said_once(tmp_path, caplog):
    film(tmp_path / "a.mkv", {}, track_tags={"mood": "calm", "place": "x" * 1000})
    enlarge(tmp_path / "a.mkv", tmp_path / "b.mp4")
    lines = [line for line in caplog.text.splitlines() if "cannot hold" in line]
    assert len(lines) == 1
    assert "metadata that .mp4 cannot hold was dropped: mood, place; .mkv keeps most" in lines[0].lower()


@pytest.mark.parametrize("suffix", [".mkv", ".mov", ".mp4"])
def test_strip_drops_tags_and_keeps_languages(tmp_path, suffix):
    film(tmp_path / f"a{suffix}", TAGS)
    enlarge(tmp_path / f"a{suffix}", tmp_path / f"b{suffix}", strip=True)
    assert PLACE.encode() not in (tmp_path / f"b{suffix}").read_bytes()
    kept = tags_of(tmp_path / f"b{suffix}")
    assert not set(TAGS) & set(kept)
    with opened(tmp_path / f"b{suffix}") as container:
        assert next(stream.language for stream in container.streams.audio) == "eng"
        assert "Track" not in str([stream.metadata for stream in container.streams])


def test_stale_tags_are_not_copied():
    tags = {"BPS": "1", "BPS-eng": "1", "NUMBER_OF_FRAMES": "3", "DURATION-eng": "x", "_STATISTICS_TAGS": "BPS"}
    assert kept_tags(tags | {"encoder": "x", "ENCODER": "x", "title": "t"}) == {"title": "t"}


def test_classic_tags_stay_classic():
    """Players know the classic tags of MP4 and MOV; the others replace them only if there are keys of other kinds."""
    assert container_tags({"title": "t"}, "mp4", strip=False) == ({"title": "t"}, {})
    assert container_tags({"title": "t", "x": "y"}, "matroska", strip=False)[1] == {}
    assert container_tags({"title": "t", "x": "y"}, "mp4", strip=False)[1]
    assert container_tags({"x": "y"}, "mp4", strip=True) == ({}, {})


def test_lost_tags():
    assert lost_tags({"a": "1", "b": "2"}, {"A": "1"}) == ["b"]
    assert lost_tags({"language": "und"}, {}) == []
    assert lost_tags({"language": "fre"}, {"language": "fra"}) == []
    assert lost_tags({"location": "x"}, {"com.apple.quicktime.location.ISO6709": "x"}) == []
    assert lost_tags({"creation_time": "2021-05-06T07:08:09.123Z"}, {"creation_time": "2021-05-06T07:08:09.000Z"}) == []
    assert lost_tags({"title": "x"}, {"name": "x"}) == []


def rich(path: Path) -> None:
    """A Matroska film with chapters, a font, a cover and a tag that is not UTF-8."""
    from fractions import Fraction

    make(path.with_name("plain.mkv"), count=4, audio=1)
    picture = path.with_name("picture.mov")
    make(picture, count=1, audio=0, codec="png", pixel_format="rgb24")
    with (
        av.open(str(path.with_name("plain.mkv"))) as source,
        av.open(str(picture)) as cover,
        open(path, "wb") as file,
        av.open(file, "w", format="matroska", metadata_errors="surrogateescape") as output,
    ):
        copies = {stream.index: output.add_stream_from_template(stream) for stream in source.streams}
        output.add_attachment("font.ttf", "font/ttf", b"not really a font" * 10)
        art = next(packet for packet in cover.demux(video=0) if packet.size)
        output.add_attachment("cover.png", "image/png", bytes(art))
        base = Fraction(1, 1000)
        output.set_chapters(
            [
                {"id": 1, "start": 0, "end": 100, "time_base": base, "metadata": {"title": "One"}},
                {"id": 2, "start": 100, "end": 200, "time_base": base, "metadata": {"title": "Two"}},
            ]
        )
        output.metadata["comment"] = "caf\udce9"
        for packet in source.demux():
            if packet.size:
                packet.stream = copies[packet.stream.index]
                output.mux(packet)
    path.with_name("plain.mkv").unlink()
    picture.unlink()


def test_chapters_attachments_and_covers(tmp_path, caplog):
    rich(tmp_path / "a.mkv")
    enlarge(tmp_path / "a.mkv", tmp_path / "b.mkv")
    with opened(tmp_path / "a.mkv") as first, opened(tmp_path / "b.mkv") as second:
        assert second.chapters() == first.chapters()
        assert len(first.chapters()) == 2
        assert second.metadata["COMMENT"] == first.metadata["COMMENT"] == "caf\udce9"
        fonts = [[s.data for s in each.streams if s.type == "attachment"] for each in (first, second)]
        assert fonts[0] == fonts[1] == [b"not really a font" * 10]
        covers = [sum("attached_pic" in flags(s) for s in each.streams.video) for each in (first, second)]
        assert covers == [1, 1]
    assert "dropped" not in caplog.text
    enlarge(tmp_path / "a.mkv", tmp_path / "b.mp4")
    assert caplog.text.count("attachment stream dropped: mp4 does not support attachments") == 1
    with opened(tmp_path / "b.mp4") as container:
        assert [chapter["metadata"] for chapter in container.chapters()] == [{"title": "One"}, {"title": "Two"}]
        assert len(container.streams.video) == 2
    enlarge(tmp_path / "a.mkv", tmp_path / "c.mkv", strip=True)
    with opened(tmp_path / "c.mkv") as container:
        assert len(container.streams.video) == 1
        assert [stream.type for stream in container.streams].count("attachment") == 1
