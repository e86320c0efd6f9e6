"""No name and no content of a film makes FFmpeg read another file or connect; whatever PyAV decodes is a film."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.files.video.films import enlarge, make, times
from tinysr_kernels.errors import InputError
from tinysr_kernels.files.video import probe_video
from tinysr_kernels.files.video.opening import opened

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


def with_reference(data: bytes, path: bytes) -> bytes:
    """A MOV whose samples lie in another file: an alias with a relative path in its data reference box.

    The index is last in the file, so that no offset changes; the boxes around the reference grow.
    """
    name = path.rpartition(b"/")[2]
    alias = bytes(10) + bytes([1]) + b"v".ljust(27, b"\0") + bytes(12) + bytes([len(name)]) + name.ljust(63, b"\0")
    alias += bytes(16) + b"\0\1\0\1" + bytes(16) + struct.pack(">HH", 2, len(path)) + path + b"\0" * (len(path) % 2)
    alias += b"\xff\xff\0\0"
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    own = data.index(b"url \0\0\0\1") - 4
    result = bytearray(data[:own] + entry + data[own + 12 :])
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = result.index(box) - 4
        result[at : at + 4] = struct.pack(">I", struct.unpack(">I", result[at : at + 4])[0] + len(entry) - 12)
    return bytes(result)


def test_external_data_of_mov_is_not_read(tmp_path, monkeypatch):
    """Raw video whose pixels would be the bytes of another file."""
    monkeypatch.chdir(tmp_path)
    make(Path("a.mov"), audio=0, codec="rawvideo", pixel_format="rgb24", count=1)
    Path("secret").write_bytes(b"s" * 100_000)
    Path("a.mov").write_bytes(with_reference(Path("a.mov").read_bytes(), b"/v/secret"))

    def content(container: Any) -> bytes:
        return b"".join(bytes(packet) for packet in container.demux())

    with av.open("a.mov", options={"enable_drefs": "1"}) as container:
        assert b"ssss" in content(container)  # the file does what it is to do
    with opened(Path("a.mov")) as container:
        assert content(container) == b""
    with pytest.raises(InputError, match="no frame can be decoded"):
        enlarge(Path("a.mov"), Path("b.mov"))


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
