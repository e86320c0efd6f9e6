"""What is printed neither fails nor obeys what it prints."""

from __future__ import annotations

import io
import os
import re
import sys
import time

import pytest

from tests.cli.command import upscale
from tests.files.runs import save
from tests.files.video.films import make
from tinysr_kernels.cli import terminal
from tinysr_kernels.cli import upscale as upscale_command
from tinysr_kernels.cli.main import main
from tinysr_kernels.files.batch import Result
from tinysr_kernels.runtime.notices import collect_notices, notice

HOSTILE = ["\x1b]0;title\x07", "\x9b31m", "a\rb", "two\nlines", "\u202etxt.exe", "\u2066x", "\x7f", "\u200f", "\udcff"]


@pytest.mark.parametrize("text", HOSTILE)
def test_everything_that_reaches_a_stream_is_escaped(compiled, tmp_path, capsys, text):
    if os.name == "nt":
        pytest.skip("Windows has no such names")
    try:
        save(tmp_path / "in" / f"{text}.png")
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes no such name")
    (tmp_path / "in" / f"{text}.jpg").write_text(text.encode(errors="replace").decode())
    assert upscale(tmp_path / "in", "-o", tmp_path / "out") == 1
    assert upscale(tmp_path / text, "-o", tmp_path / "out") == 1
    assert upscale(tmp_path / "in", "-o", tmp_path / f"{text}.png") == 2
    with pytest.raises(SystemExit):
        upscale("a.png", "-o", "out", f"--{text}")
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    for stream in (captured.out, captured.err):
        assert all(letter.isprintable() or letter == "\n" for letter in stream)
        assert text.encode("unicode_escape").decode() in stream


def test_notices_are_escaped_where_they_are_made():
    with collect_notices() as messages:
        notice("a\x1b[2Jb\u202ec")
    assert messages == ["a\\x1b[2Jb\\u202ec"]


def test_facts_are_escaped(compiled, capsys, monkeypatch):
    import tinysr_kernels

    monkeypatch.setattr(tinysr_kernels, "describe", lambda _path: {"k\x1b[0m": ["\x9b1m", {"x": "\u202e"}]})
    assert main(["info", "demo"]) == 0
    assert main(["info", "demo", "--json"]) == 0
    assert all(letter.isprintable() or letter == "\n" for letter in capsys.readouterr().out)


class Broken(io.StringIO):
    """A stream whose disk is full or whose reader has gone."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise self.error


ERRORS = [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe"), ValueError("closed file")]


@pytest.mark.parametrize("error", [None, *ERRORS])
def test_streams_never_decide_about_the_work(compiled, folder, monkeypatch, error):
    streams = [None if error is None else Broken(error) for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert upscale(folder / "in", "-o", folder / "out") == 1
    assert upscale(folder / "in" / "a.png", folder / "in" / "b.jpg", "-o", folder / "out") == 0
    assert upscale(folder / "in" / "a.png", "-o", folder / "x.exr") == 2
    assert (folder / "out" / "a.png").exists()
    assert (folder / "out" / "b.jpg").exists()
    assert all(stream is None or stream.writes == 1 for stream in streams)
    assert main(["info", "demo"]) == 1  # its output is its work


def test_an_encoding_that_lacks_a_letter(compiled, tmp_path, monkeypatch):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="cp1252", errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    save(tmp_path / "in" / "日本 é.png")
    (tmp_path / "in" / "нет.png").write_text("text")
    assert upscale(tmp_path / "in", "-o", tmp_path / "out") == 1
    out, err = (stream.buffer.getvalue() for stream in streams)  # type: ignore[attr-defined]
    assert b"\\u65e5\\u672c \xe9.png" in out
    assert b"\\u043d\\u0435\\u0442.png" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_films_show_frames_rate_and_time_left_on_a_terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "100")
    progress = upscale_command.Progress(2, quiet=False, print_paths=False)
    for done in (38, 39, 40):
        progress.frames(done, 40)
        time.sleep(0.11)
    progress.result(Result("clip.mp4", "x.mp4", "done"))
    progress.frames(1, None)
    progress.close()
    text = stream.getvalue()
    assert re.search(r"39/40 \[00:00<00:00, +\d+\.\d+frame/s\]", text)
    assert "1/2" in text
    hidden = Terminal()
    monkeypatch.setattr(sys, "stderr", hidden)
    quiet = upscale_command.Progress(2, quiet=True, print_paths=False)
    quiet.frames(1, 40)
    quiet.close()
    assert hidden.getvalue() == ""


def test_frames_of_films_reach_the_bar(compiled, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(upscale_command.Progress, "frames", lambda _self, done, total: seen.append((done, total)))
    make(tmp_path / "a.mp4")
    assert upscale(tmp_path / "a.mp4", "-o", tmp_path / "b.mp4") == 0
    assert seen
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]


def test_a_stream_is_given_up_by_itself():
    first, second = io.StringIO(), io.StringIO()
    first.close()
    assert not terminal.write(first, "x")
    assert terminal.write(second, "x")
