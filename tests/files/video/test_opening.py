"""No name and no content of a film makes FFmpeg read another file or connect; whatever PyAV decodes is a film."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.files.video.films import enlarge, make, times
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.video import probe_video

av = pytest.importorskip("av")


@pytest.fixture
def server() -> Iterator[tuple[int, list[bytes]]]:
    """A local port and what came to it."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                seen.append(b"connected")
                connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listener.getsockname()[1], seen
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("name", ["12:30.mp4", "file:a.mp4", "a%d.mkv", "a%03d.mp4", "-", "pipe:0", "subfile,,:x", "*"])
def test_names_are_no_addresses(tmp_path, monkeypatch, name):
    make(tmp_path / "whole.mp4", count=3)
    monkeypatch.chdir(tmp_path)
    source = Path(name)
    (tmp_path / "whole.mp4").rename(source)
    assert probe_video(source)
    target = Path(f"out{name}.mp4")
    assert enlarge(source, target).frames == 3
    assert len(times(tmp_path / target)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, target.name])


def test_a_name_does_not_read_another_file_or_connect(tmp_path, monkeypatch, server):
    port, seen = server
    monkeypatch.chdir(tmp_path)
    make(Path("secret.mp4"), count=1)
    for name in (f"http:127.0.0.1:{port}", f"tcp:127.0.0.1:{port}", "file:secret.mp4", "concat:secret.mp4|secret.mp4"):
        assert not probe_video(Path(name))
        with pytest.raises(FileNotFoundError):
            enlarge(Path(name), Path("out.mp4"))
        Path(name).write_bytes(b"not a film")
        assert not probe_video(Path(name))
        with pytest.raises(InputError, match="not a readable video"):
            enlarge(Path(name), Path("out.mp4"))
    assert not seen


def hostile(port: int, secret: Path) -> dict[str, bytes]:
    """Files that make FFmpeg open an address or another file."""
    address = f"http://127.0.0.1:{port}/a.ts"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" mediaPresentationDuration="PT1S">'
        '<Period><AdaptationSet><Representation id="1" bandwidth="1"><BaseURL>{}</BaseURL></Representation>'
        "</AdaptationSet></Period></MPD>"
    )
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    texts = {
        "hls": playlist.format(address),
        "hls-file": playlist.format(secret),
        "dash": dash.format(address),
        "dash-file": dash.format(secret),
        "concat": f"ffconcat version 1.0\nfile {secret}\n",
        "sdp": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n",
        "asx": f'<asx version="3.0"><entry><ref href="{address}"/></entry></asx>',
        "smooth": f"[Reference]\r\nRef1={address}\r\n",
        "vobsub": "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 0\n",
    }
    return {name: text.encode() for name, text in texts.items()}


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".mpd", ".sdp", ".idx", ".txt"])
def test_playlists_and_lists_are_no_films(tmp_path, server, suffix):
    port, seen = server
    secret = tmp_path / "secret.ts"
    make(secret, count=2, audio=0)
    for name, data in hostile(port, secret).items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(data)
        assert not probe_video(path), name
        with pytest.raises(InputError, match="not a readable video"):
            enlarge(path, tmp_path / "out.mp4")
    assert not seen


def test_external_data_of_mov_is_not_read(tmp_path):
    """A data reference that names another file: its samples would be that file's bytes."""
    make(tmp_path / "a.mov", audio=0, codec="rawvideo", pixel_format="rgb24", count=2)
    data = (tmp_path / "a.mov").read_bytes()
    own = b"\0\0\0\x0curl \0\0\0\x01"  # "the data are in this file"
    assert data.count(own) == 1
    name = str(tmp_path / "secret").encode() + b"\0"
    (tmp_path / "secret").write_bytes(b"s" * 100_000)
    alias = b"\0\0\0\0alis\0\0\0\0"
    # Same size as before, so that no other box moves: an alias without a path, not marked as this file.
    (tmp_path / "a.mov").write_bytes(data.replace(own, own[:4] + alias[4:8] + own[8:11] + b"\0"))
    assert name
    enlarge(tmp_path / "a.mov", tmp_path / "b.mov")
    assert b"ssss" not in (tmp_path / "b.mov").read_bytes()


FILMS = [
    *((".wmv", "wmv2", "asf"), (".mts", "libx264", "mpegts"), (".y4m", "rawvideo", None), (".ivf", "libvpx-vp9", None)),
    *((".avi", "mpeg4", None), (".flv", "flv", None), (".3gp", "mpeg4", None), (".nut", "ffv1", None)),
    *((".264", "libx264", None), (".265", "libx265", None), (".ogv", "libvpx", None), (".webm", "libvpx-vp9", None)),
    *((".mkv", "mpeg4", None), (".mov", "png", None)),
]


@pytest.mark.parametrize(("suffix", "codec", "form"), FILMS)
def test_whatever_pyav_decodes_is_a_film(tmp_path, suffix, codec, form):
    """By content: the file has no suffix."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV lacks {codec}")
    name, path = tmp_path / f"a{suffix}", tmp_path / "film"
    pixel_format = "rgb24" if codec == "png" else "yuv420p"
    make(name, codec=codec, form=form, audio=0, count=6, size=(96, 72), pixel_format=pixel_format)
    name.rename(path)
    assert probe_video(path)
    report = enlarge(path, tmp_path / "b.mkv")
    assert (report.frames, report.repeated, report.output_size) == (6, 0, (384, 288))


def test_a_mov_without_ftyp_is_a_film(tmp_path):
    make(tmp_path / "a.mov", count=3, audio=0)
    data = (tmp_path / "a.mov").read_bytes()
    size = int.from_bytes(data[:4], "big")
    assert data[4:8] == b"ftyp"
    # "free" instead of "ftyp" keeps the offsets; old cameras wrote neither.
    (tmp_path / "a.mov").write_bytes(data[:4] + b"free" + data[8:])
    assert size < len(data)
    assert probe_video(tmp_path / "a.mov")
    assert enlarge(tmp_path / "a.mov", tmp_path / "b.mov").frames == 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 50_000,
        b"text " * 10_000,
        random.Random(0).randbytes(200_000),
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(500),
        b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + bytes(500),
        b"\x1aE\xdf\xa3" + bytes(500),
        b"RIFF\xff\xff\xff\xffAVI LIST" + bytes(500),
        b"PK\x03\x04" + bytes(500),
    ],
    ids=["empty", "zeros", "text", "noise", "heic", "avif", "ebml", "avi", "zip"],
)
def test_other_files_are_no_films(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    assert not probe_video(tmp_path / "x")


def test_what_is_no_file_is_no_film(tmp_path):
    assert not probe_video(tmp_path)
    assert not probe_video(tmp_path / "missing")
    assert not probe_video(Path("\0"))


def test_sound_with_a_cover_is_no_film(tmp_path):
    """An album cover is a video stream of one frame."""
    make(tmp_path / "cover.mov", codec="png", pixel_format="rgb24", count=1, audio=1)
    with av.open(str(tmp_path / "cover.mov")) as source, av.open(str(tmp_path / "a.m4a"), "w", format="mp4") as output:
        copies = {stream.index: output.add_stream_from_template(stream, opaque=True) for stream in source.streams}
        copies[source.streams.video[0].index].disposition = av.stream.Disposition.attached_pic
        for packet in source.demux():
            if packet.size:
                packet.stream = copies[packet.stream.index]
                output.mux(packet)
    assert not probe_video(tmp_path / "a.m4a")
    with pytest.raises(InputError, match="no video stream"):
        enlarge(tmp_path / "a.m4a", tmp_path / "b.mp4")
