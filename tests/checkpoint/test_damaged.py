"""Damaged and hostile files: always a CheckpointError, never another exception, and nothing in a file ever runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.checkpoint.edit import edit_json, raw_safetensors, read, refused
from tests.layouts.adcsr import HALF_DECODER, NET, write_adcsr
from tests.layouts.tinysr import LORA, STEM, TRANSFORMER, write_tinysr
from tests.layouts.unet import write_unet
from tests.layouts.weights import write_pickle
from tinysr_kernels.checkpoint.read.shards import read_weights
from tinysr_kernels.checkpoint.read.tensor_file import read_file
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import load, role_of

SHARD = f"{TRANSFORMER}/{STEM}-00001-of-00002.safetensors"
INDEX = f"{TRANSFORMER}/{STEM}.safetensors.index.json"
WEIGHTS = f"{TRANSFORMER}/{STEM}.safetensors"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """One file of each kind, as bytes by suffix."""
    folder = tmp_path_factory.mktemp("written")
    kinds = {".safetensors": write_unet(folder / "a.safetensors").path.read_bytes()}
    state = {"unet.conv_in.weight": torch.randn(4, 4), "half": torch.randn(3).half()}
    write_pickle(folder / "a.pt", {"state_dict": state, "epoch": 1})
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    return {**kinds, ".pt": (folder / "a.pt").read_bytes(), ".old.pt": (folder / "old.pt").read_bytes()}


def _survives(path: Path) -> None:
    """Reading and loading give a result or a CheckpointError; what was read can be touched to its end."""
    try:
        file = read_file(path)
        role_of(file)
        for tensor in file.tensors.values():
            tensor.double().sum()
        load(path)
    except CheckpointError:
        pass


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".old.pt"])
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
def test_truncated(
    written: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, suffix: str, share: float
) -> None:
    path = tmp_path_factory.getbasetemp() / f"truncated{suffix}"
    data = written[suffix]
    path.write_bytes(data[: int(share * len(data))])
    refused(path, path.name)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".old.pt"])
@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(
    written: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, suffix: str, flips: list[tuple[float, int]]
) -> None:
    path = tmp_path_factory.getbasetemp() / f"flipped{suffix}"
    data = bytearray(written[suffix])
    header = 8 + struct.unpack("<Q", data[:8])[0] if suffix == ".safetensors" else len(data)
    for where, mask in flips:
        data[int(where * header)] ^= mask
    path.write_bytes(data)
    _survives(path)


@given(data=st.binary(max_size=200), suffix=st.sampled_from([".safetensors", ".pt", ".bin", ".index.json"]))
def test_any_bytes(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    refused(path, path.name)


# -------------------------------------------------------------------------------------------- safetensors
def _entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([], ["list"]),
        (b"{" * 100_000, ["JSON"]),
        (b"\xff\xfe", ["JSON"]),
        (b'{"a": ' + b"9" * 10_000 + b"}", ["JSON"]),
        (b'{"a": {}, "a": {}}', ["'a'", "twice"]),
        ({"a": 3}, ["'a'", "3"]),
        ({"a": {"dtype": "F32"}}, ["'a'", "shape"]),
        ({"a": _entry(dtype="F7")}, ["'a'", "F7"]),
        ({"a": _entry(dtype=["F32"])}, ["'a'", "F32"]),
        ({"a": _entry(shape=[-2])}, ["'a'", "-2"]),
        ({"a": _entry(shape=[2.0])}, ["'a'", "2.0"]),
        ({"a": _entry(shape=[True, 2])}, ["'a'", "True"]),
        ({"a": _entry(shape=[2**40, 2**40])}, ["'a'", "2^48"]),
        ({"a": _entry(shape=[3])}, ["'a'", "12", "8"]),
        ({"a": _entry(offsets=[0, 8, 9])}, ["'a'", "data_offsets"]),
        ({"a": _entry(offsets=[8, 0])}, ["'a'", "data_offsets"]),
        ({"a": _entry(offsets=[4, 12])}, ["'a'", "gap"]),
        ({"a": _entry(), "b": _entry()}, ["'b'", "overlaps"]),
        ({"a": _entry(), "b": _entry(offsets=[4, 12])}, ["'b'", "overlaps"]),
        ({"a": _entry(), "b": _entry(offsets=[8, 16])}, ["16 bytes", "found 8"]),
        ({}, ["0 bytes", "found 8"]),
        ({"__metadata__": {"a": 1}, "a": _entry()}, ["__metadata__"]),
        ({"__metadata__": [], "a": _entry()}, ["__metadata__"]),
        ({"x" * 10_000 + "\x1b[2J": 3}, ["x" * 50]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_headers(tmp_path: Path, header: object, words: list[str]) -> None:
    message = refused(raw_safetensors(tmp_path / "a.safetensors", header, bytes(8)), "a.safetensors", *words)
    assert len(message) < 2000
    assert "\x1b" not in message


@pytest.mark.parametrize("length", [2**63, 2**40, 100_000_001, 50, 0])
def test_header_lengths(tmp_path: Path, length: int) -> None:
    refused(raw_safetensors(tmp_path / "a.safetensors", {"a": _entry()}, bytes(8), length), "a.safetensors", "header")


# ----------------------------------------------------------------------------------------------- pickles
class Payload:
    """Pickles into a call that leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.path,)


class Plain:
    """An object that a training script may have saved."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".ckpt", ".pth"])
def test_code_in_a_pickle_never_runs(tmp_path: Path, suffix: str, zipped: bool) -> None:
    trace = tmp_path / "it-ran"
    path = tmp_path / f"weights{suffix}"
    torch.save({"a": torch.ones(1), "b": Payload(trace)}, path, _use_new_zipfile_serialization=zipped)
    refused(path, path.name, "refused", "mkdir", "rewrite it once")
    refused(tmp_path, path.name, "refused")
    path.write_bytes(pickle.dumps(Payload(trace)))
    refused(path, path.name)
    assert not trace.exists()


def test_code_in_every_part(tmp_path: Path) -> None:
    write_tinysr(tmp_path, lora=True, as_bin=True)
    trace = tmp_path / "it-ran"
    for path in [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt")]:
        kept = path.read_bytes()
        torch.save({"a": Payload(trace)}, path)
        refused(tmp_path, path.name, "mkdir")
        path.write_bytes(kept)
    assert load(tmp_path).tensors
    assert not trace.exists()


def test_a_pickle_of_more_than_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"state_dict": {"a": torch.ones(1)}, "model": Plain()}, path)
    refused(path, "refused", "Plain", "weights_only=False")
    with zipfile.ZipFile(path, "w") as archive:  # as torch.jit.save lays it out
        archive.writestr("a/code/__torch__.py", "raise SystemExit")
    refused(path, "TorchScript")
    for value in ([torch.ones(1)], "text", {"a": "text"}, {"a": {"b": torch.ones(1)}}, {}, {3: torch.ones(1)}):
        torch.save(value, path)
        refused(path, "a.pt")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(1).expand(10**6, 10**4), ["bytes"]),
        (torch.eye(3).to_sparse(), ["sparse"]),
        (torch.ones(3, device="meta"), ["meta"]),
    ],
)
def test_odd_tensors(tmp_path: Path, tensor: torch.Tensor, words: list[str]) -> None:
    torch.save({"unet.conv_in.weight": tensor}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "a.pt", "unet.conv_in.weight", *words)


def _rezip(path: Path, change: str, data: bytes | None, compression: int = zipfile.ZIP_STORED) -> None:
    """Write the archive again with one record's data replaced, or all records compressed."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, data if data is not None and name.endswith(change) else old.read(name))


def test_archives_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_pickle(path, {"a": torch.zeros(1_000_000)})
    _rezip(path, "", None, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 100_000
    refused(path, "compressed")
    write_pickle(path, {"a": torch.zeros(1_000_000)})
    _rezip(path, "data/0", bytes(4))
    refused(path, "a.pt")
    write_pickle(path, {"a": torch.zeros(10)})
    _rezip(path, "data.pkl", b"\x80\x02" + b"(" * 100_000 + b".")
    refused(path, "a.pt")


# ----------------------------------------------------------------------------------------------- shards
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../elsewhere.safetensors", ["beside the index"]),
        ("/etc/passwd", ["beside the index"]),
        ("sub/a.safetensors", ["beside the index"]),
        ("..\\a.safetensors", ["beside the index"]),
        ("C:a.safetensors", ["beside the index"]),
        ("..", ["beside the index"]),
        ("", ["name of a file"]),
        ("a\0.safetensors", ["name of a file"]),
        (3, ["name of a file", "3"]),
        ("config.json", ["file of tensors"]),
        (f"{STEM}.safetensors.index.json", ["file of tensors"]),
        ("missing.safetensors", ["missing.safetensors"]),
    ],
)
def test_names_in_an_index(tmp_path: Path, name: object, words: list[str]) -> None:
    write_tinysr(tmp_path, sharded=True)
    where = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    edit_json(tmp_path / INDEX, weight_map={**where, "proj_out.bias": name})
    refused(tmp_path, TRANSFORMER, *words)


def test_an_index_in_a_circle(tmp_path: Path) -> None:
    first, second = tmp_path / "a.index.json", tmp_path / "b.index.json"
    first.write_text('{"weight_map": {"a": "b.index.json"}}')
    second.write_text('{"weight_map": {"a": "a.index.json"}}')
    refused(first, "a.index.json", "file of tensors")
    refused(tmp_path, "index.json", "file of tensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    first.write_text('{"weight_map": {"a": "loop.safetensors"}}')
    refused(first, "loop.safetensors")


def test_shards_that_disagree_with_their_index(tmp_path: Path) -> None:
    write_tinysr(tmp_path, sharded=True)
    where = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    edit_json(tmp_path / INDEX, weight_map={k: v for k, v in where.items() if k != "norm_out.linear.bias"})
    refused(tmp_path, "norm_out.linear.bias", "unexpected")
    edit_json(tmp_path / INDEX, weight_map={**where, "norm_out.more": where["norm_out.linear.bias"]})
    refused(tmp_path, "norm_out.more", "missing")
    for value in (None, [], {}, "text"):
        edit_json(tmp_path / INDEX, weight_map=value)
        refused(tmp_path, "weight_map")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    refused(tmp_path, "'a'", "twice")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    for name in "ab":
        raw_safetensors(tmp_path / f"{name}.safetensors", {"x": _entry()}, bytes(8))
    index = tmp_path / "w.index.json"
    index.write_text('{"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}')
    with pytest.raises(CheckpointError, match="also in another shard"):
        read_weights(index)


# ------------------------------------------------------------------------------------- files and folders
def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "empty.safetensors", "empty file")
    refused(tmp_path / "notes.txt", "ending in")
    refused(tmp_path / "folder.safetensors", "no files of tensors")
    refused(tmp_path / "pipe.safetensors", "regular file")
    refused(tmp_path / "missing.safetensors", "missing.safetensors")
    refused(tmp_path / "missing", "missing")
    refused("a\0b", "expected a path" if os.name == "nt" else "opened")
    refused("x" * 5000, "opened")
    refused(tmp_path, "empty.safetensors", "empty file")
    refused({"transformer": tmp_path / "notes.txt", "vae": tmp_path}, "notes.txt")


def test_folders_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, str(tmp_path), "no files of tensors")
    for i in range(30):
        (tmp_path / f"{i}.png").touch()
    monkeypatch.setattr("tinysr_kernels.checkpoint.detect.MAX_ENTRIES", 20)
    refused(tmp_path, "more than 20 entries")


def test_too_deep_is_not_searched(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*"abcdefghijkl")
    write_unet(deep / "model.safetensors")
    refused(tmp_path, "no files of tensors")
    assert load(deep).tensors


def test_links_in_a_circle(tmp_path: Path) -> None:
    layout = write_unet(tmp_path / "sub/model.safetensors")
    for i in range(5):
        (tmp_path / f"sub/link{i}").symlink_to(tmp_path, target_is_directory=True)
    assert set(load(tmp_path).tensors) == set(layout.tensors())


@pytest.mark.parametrize("file", [WEIGHTS, LORA, "dataset/default/pool_embeds.pt"])
def test_a_damaged_part_is_never_left_out(tmp_path: Path, file: str) -> None:
    write_tinysr(tmp_path, lora=True, decoys=True)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-40])
    refused(tmp_path, file)


@pytest.mark.parametrize("file", [NET, HALF_DECODER])
def test_a_damaged_half_of_adcsr(tmp_path: Path, file: str) -> None:
    write_adcsr(tmp_path, channels=(48, 48), layers=1, decoder_channels=(8, 8, 8, 8))
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[:-40])
    refused(tmp_path, file, "truncated")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"_class_name": 3}'])
def test_broken_configurations(tmp_path: Path, content: bytes) -> None:
    write_tinysr(tmp_path)
    (tmp_path / TRANSFORMER / "config.json").write_bytes(content)
    refused(tmp_path, "config.json")


def test_reading_maps_files_instead_of_copying(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write_pickle(path, {"unet.conv_in.weight": torch.zeros(1000)})
    before = read_file(path).tensors["unet.conv_in.weight"]
    assert torch.equal(before, torch.zeros(1000))
    layout = write_unet(tmp_path / "a.safetensors")
    assert set(read(layout.path)[0]) == set(read_file(layout.path).tensors)
