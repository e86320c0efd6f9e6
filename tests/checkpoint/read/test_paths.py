"""Files that are none, names that no terminal shows, JSON without bounds: one documented error each, and no waiting."""

from __future__ import annotations

import errno
import json
import mmap
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.edit import raw_safetensors, refused
from tests.layouts.unet import write_unet
from tinysr_kernels.checkpoint.read import paths
from tinysr_kernels.checkpoint.read.header import TENSOR_LIMIT
from tinysr_kernels.checkpoint.read.paths import parse_json, read_json
from tinysr_kernels.checkpoint.read.shards import read_index
from tinysr_kernels.checkpoint.read.tensor_file import read_file
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.errors import CheckpointError, OutOfMemory
from tinysr_kernels.families import load


def _error(*arguments: Any, read: Any = read_file) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(*arguments)
    assert len(str(caught.value)) <= 2000
    assert str(caught.value).isprintable()
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_pipe_that_takes_a_files_place_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    os.mkfifo(path)
    assert "regular file" in _error(path)
    monkeypatch.setattr(paths, "regular_file", lambda _: 1)  # as if it had been a file a moment ago
    assert "regular file" in _error(path)


@pytest.mark.parametrize("target", ["/dev/full", "/dev/null", "/dev/stdin", ".", "a.pt", "missing"])
def test_links_to_what_is_no_file(tmp_path: Path, target: str) -> None:
    (tmp_path / "a.pt").symlink_to(target)
    _error(tmp_path / "a.pt")
    _error(tmp_path / "a.pt", read=read_json)


@pytest.mark.parametrize(
    "error", [PermissionError(errno.EACCES, "denied"), OSError(errno.ENODEV, "no maps"), MemoryError()]
)
@pytest.mark.parametrize("call", ["open", "mmap"])
def test_files_that_cannot_be_opened_or_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    path = write_unet(tmp_path / "a.safetensors").path
    opened = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(os if call == "open" else mmap, call, fails)
    assert "cannot be read" in _error(path)
    monkeypatch.undo()
    assert not opened or len(os.listdir("/proc/self/fd")) == opened


def test_a_file_that_shrinks_before_it_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_unet(tmp_path / "a.safetensors").path
    monkeypatch.setattr(paths, "regular_file", lambda _: os.truncate(path, 100))
    assert "truncated" in _error(path)


@pytest.mark.parametrize("spaces", range(4))
def test_copies_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spaces: int) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": entry}).encode() + b" " * spaces
    path = raw_safetensors(tmp_path / "a.safetensors", header, bytes(8))
    assert read_file(path).tensors["a"].tolist() == [0, 0]

    def fails(_: torch.Tensor) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch.Tensor, "clone", fails)
    tensors = read_file(path).tensors  # nothing is copied before it is used, however it lies
    assert tensors["a"].tolist() == [0, 0]
    if len(header) % 4 == 0:
        assert paths.Released(tensors)["a"].tolist() == [0, 0]
    else:
        with pytest.raises(RuntimeError, match="allocate"):
            paths.Released(tensors)["a"]
    with pytest.raises(OutOfMemory, match="8 bytes"):
        paths.MappedFile(path).flat(torch.float32, path.stat().st_size - 8, 2, "big")
    monkeypatch.undo()
    assert paths.Released(tensors)["a"].data_ptr() % 4 == 0


@pytest.mark.parametrize("name", [b"caf\xe9", b"\x1b[2J", b"a\nb", b"\xe2\x80\xaegnp", b"x" * 200, b"'"])
def test_any_name_a_file_can_have(tmp_path: Path, name: bytes) -> None:
    layout = write_unet(tmp_path / "a.safetensors")
    odd = os.fsdecode(name)
    path = tmp_path / f"{odd}.safetensors"
    os.rename(layout.path, path)
    assert set(load(path).tensors) == set(load(tmp_path).tensors) == set(layout.tensors())
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pt")
    os.rename(tmp_path / "a.pt", tmp_path / f"{odd}.pt")
    assert read_file(tmp_path / f"{odd}.pt").tensors
    path.write_bytes(b"damaged" * 10)
    _error(path)
    assert refused(tmp_path).isprintable()


# ------------------------------------------------------------------------------------------------- JSON
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"[" * 31 + b"]" * 31, "object"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "32 levels"),
        (b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", "32 levels"),
        (b'{"a":' * 10**6, "JSON"),
        (b'{"a":' + b"9" * 41 + b"}", "41 digits"),
        (b'{"a":-' + b"9" * 10**6 + b"}", "digits"),
        (b'{"a":1,"a":2}', "'a' occurs twice"),
        (b'{"a":{"b":1,"\\u0062":2}}', "'b' occurs twice"),
        (b'{"a":"\\ud800"}', "surrogates"),
        (b'{"\\udfff":1}', "surrogates"),
        (b'{"a":["\\udfff"]}', "surrogates"),
        (b'{"' + b"\\u001b" * 10**5 + b'":1,"' + b"\\u001b" * 10**5 + b'":1}', "twice"),
        (b"[" + b"0," * 2_000_001 + b"0]", "2000000 values"),
        (b"", "JSON"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b'{"a":1}x', "JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_json_is_bounded(text: bytes, words: str) -> None:
    assert words in _error(text, "here", read=parse_json)


def test_json_within_the_bounds() -> None:
    assert parse_json(b'{"a":[1,-2.5e3,{"b":"\\ud83d\\ude00"}]}', "here") == {"a": [1, -2500.0, {"b": "\U0001f600"}]}
    text = json.dumps({str(i): {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]} for i in range(20_000)})
    assert len(parse_json(text.encode(), "here")) == 20_000


def test_large_json_files_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**40)
    assert str(2**40) in _error(tmp_path / "a.json", read=read_json)
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write((2**26).to_bytes(8, "little"))
        file.truncate(2**27)
    assert "header claims 67108864 bytes" in _error(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------------------ many and long
def test_names_of_tensors_are_bounded(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    assert read_file(raw_safetensors(tmp_path / "a.safetensors", {"x" * 1000: entry}, bytes(4))).tensors
    path = raw_safetensors(tmp_path / "a.safetensors", {"x" * 1001: entry}, bytes(4))
    assert "at most 1000 characters" in _error(path)
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {"x" * 1001: "a.safetensors"}}))
    assert "at most 1000 characters" in _error(tmp_path / "a.index.json", read=read_index)


def test_counts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert TENSOR_LIMIT >= 10_000
    monkeypatch.setattr("tinysr_kernels.checkpoint.read.header.TENSOR_LIMIT", 10)
    entries = {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(11)}
    assert "at most 10 tensors" in _error(raw_safetensors(tmp_path / "a.safetensors", entries))
    monkeypatch.setattr("tinysr_kernels.checkpoint.read.shards.SHARD_LIMIT", 10)
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": {str(i): f"{i}.bin" for i in range(11)}}))
    assert "at most 10 files" in _error(tmp_path / "a.index.json", read=read_index)


def test_a_network_of_many_blocks_takes_linear_time() -> None:
    """A hundred thousand blocks; a look at all names for each took minutes."""
    one = torch.zeros(1)
    weights = Weights({f"blocks.{i}.{part}.{j}.w": one for i in range(5000) for part in "abcd" for j in range(5)}, "x")
    started = time.process_time()
    assert weights.count("blocks") == 5000
    for i in range(5000):
        assert weights.count(f"blocks.{i}.a") == 5
        assert weights.has_under(f"blocks.{i}.b")
        assert not weights.has_under(f"blocks.{i}.e")
    assert time.process_time() - started < 10


def test_counts_of_children() -> None:
    names = ["a.0.w", "a.1.w", "a.10.w", "ab.2.w", "a.x.w", "a.3", "a", "a.00000.w", "a-.5.w"]
    weights = Weights(dict.fromkeys(names, torch.zeros(1)), "x")
    with pytest.raises(CheckpointError, match=r"'a\.2'.*number 10"):
        weights.count("a")
    assert (weights.count("ab.2"), weights.count("b"), weights.count("a.0")) == (0, 0, 0)
    assert [weights.has_under(name) for name in ("a", "ab", "a.3", "b", "a.0", "")] == [
        True,
        True,
        False,
        False,
        True,
        False,
    ]


def test_quotes_are_short_and_never_raise() -> None:
    class Hostile:
        def __repr__(self) -> str:
            raise RuntimeError

    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (
        Hostile(),
        circle,
        deep,
        "\x1b" * 10**6,
        10**5000,
        {"a" * 10**6: [0] * 10**6},
        b"\0" * 10**6,
        [Hostile()],
    ):
        assert 0 < len(quoted(value)) <= 120
        assert quoted(value).isprintable()
    assert quoted([1, 2, [3], {"a": None}]) == "[1, 2, [3], {'a': None}]"
    assert len(listed(["x" * 10**5] * 100)) < 2000
