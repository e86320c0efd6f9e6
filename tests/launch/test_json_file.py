"""Whatever stands where a JSON file should be is read whole, or refused in bounded time and memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tinysr_kernels.launch.json_file import DEPTH, BadFile, open_regular, read_json


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


def test_what_json_says_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, -2.5, true, null, "\\u00e9", 1e999]}', encoding="utf-8")
    assert read_json(path, 100) == {"a": [1, -2.5, True, None, "é", float("inf")]}
    path.write_text(nested(DEPTH), encoding="utf-8")
    assert read_json(path, 1000)["a"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON: 'utf-8' codec"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b'{"a": NaN}', "is not JSON: NaN is no number"),
        (b'{"a": -Infinity}', "is not JSON: -Infinity is no number"),
        (b'{"a": 1, "b": {"x": 1, "x": 2}}', "is not JSON: 'x' occurs twice"),
        (b'{"' + b"k" * 500 + b'": 1, "' + b"k" * 500 + b'": 2}', "is not JSON: 'k{60}' occurs twice$"),
        (nested(DEPTH + 1).encode(), "nested deeper than 32 levels"),
        (b"[" * 100_000, "nested deeper than 32 levels"),
        (b"9" * 5000, "is not JSON: Exceeds the limit"),
        (b"{} {}", "is not JSON: Extra data"),
        (b" " * (1 << 20) + b"{}", "has more than 1 MiB"),
    ],
    ids=["empty", "bytes", "mark", "nan", "infinity", "twice", "long-name", "deep", "deeper", "digits", "two", "large"],
)
def test_what_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=reason) as caught:
        read_json(path, 1 << 20)
    assert len(str(caught.value)) < 300


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_no_writer_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path / "link", tmp_path):
        with pytest.raises(BadFile, match="is no regular file"):
            read_json(path, 100)


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (tmp_path / "none", loop, tmp_path / ("x" * 5000)):
        with pytest.raises(OSError, match=r"loop|none|xxx"):
            read_json(path, 100)


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with open(path, "wb") as file:
        try:
            file.truncate(1 << 40)
        except OSError:
            pytest.skip("the file system has no sparse files")
    with pytest.raises(BadFile, match="has more than 1 MiB"):
        read_json(path, 1 << 20)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(20):
        with pytest.raises(BadFile):
            open_regular(tmp_path)
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1
