"""Hostile pickles: refused or harmless, at once and without memory, whatever they ask to be called, hashed or built."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch

from tests.checkpoint.read import craft
from tests.checkpoint.read.craft import MEMO, RECALL, archive, call, integer, name, state, storage, tensor, text
from tinysr_kernels.checkpoint.read import pickled
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile, read_file
from tinysr_kernels.errors import CheckpointError

A = text("a")
TWO = tensor(2, (2,))
DOUBLED = b")" + MEMO + (RECALL + b"\x86" + MEMO) * 100
"""A tuple of two tuples of two tuples ...: 2^100 steps to hash, compare or print."""
LISTS = b"(]" + MEMO + (b"]" + RECALL + b"a" + RECALL + b"a" + MEMO) * 100 + b"t"


PAIRS = b"](" + b"".join(b"K" + bytes([i]) + b"K\x00\x86" for i in range(100)) + b"e" + MEMO
"""A list of a hundred pairs, and its place in the memo."""


def _read(path: Path, data: bytes, limit: int = 20_000_000) -> TensorFile:
    archive(path / "a.pt", data)
    tracemalloc.start()
    try:
        file = read_file(path / "a.pt")
        for one in file.tensors.values():
            one.double().sum()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit
    return file


def _refused(path: Path, data: bytes, *words: str, limit: int = 20_000_000) -> None:
    with pytest.raises(CheckpointError) as caught:
        _read(path, data, limit)
    for word in ("a.pt", *words):
        assert word in str(caught.value), str(caught.value)
    assert len(str(caught.value)) < 2001


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (call("builtins", "bytearray", integer(2**40)), "builtins.bytearray"),
        (call("__builtin__", "bytearray", integer(2**40)), "builtins.bytearray"),
        (call("builtins", "set", DOUBLED), "builtins.set"),
        (call("_codecs", "encode", text("x"), text("zip")), "_codecs.encode"),
        (call("collections", "Counter", DOUBLED), "collections.Counter"),
        (call("torch", "Size", DOUBLED), "torch.Size"),
        (call("torch", "device", text("cuda:99")), "torch.device"),
        (DOUBLED, "tuple"),
        (LISTS, "tuple"),
        (b"]" + MEMO + RECALL + b"a", "list"),
        (b"}" + MEMO + A + RECALL + b"s", "dict"),
        (b")" + b"\x85" * 30_000, "tuple"),
        (integer(2**2000), "int"),
        (name("torch", "float16"), "torch.float16"),
        (storage(2), "Storage"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_what_is_no_tensor_stays_inert(tmp_path: Path, value: bytes, kind: str) -> None:
    file = _read(tmp_path, state((A, value), (text("b"), TWO)))
    assert file.others == {"a": kind}
    assert file.tensors["b"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("function", "arguments", "word"),
    [
        ("torch._utils _rebuild_sparse_tensor", b")", "sparse"),
        ("torch._utils _rebuild_meta_tensor_no_storage", b")", "meta"),
        ("torch._utils _rebuild_wrapper_subclass", b")", "another class"),
        ("torch._utils _rebuild_device_tensor_from_numpy", b")", "another class"),
        ("torch._tensor _rebuild_from_type_v2", b"(cos\nsystem\n", ""),
        ("torch FloatTensor", integer(2**40), "another class"),
        ("torch Tensor", integer(2**40), "another class"),
        ("torch.nn.parameter Parameter", integer(2**40), "another class"),
    ],
)
def test_other_tensors_are_named(tmp_path: Path, function: str, arguments: bytes, word: str) -> None:
    _refused(tmp_path, state((A, call(*function.split(), arguments))), word)


@pytest.mark.parametrize(
    "wanted",
    [
        "os system",
        "builtins eval",
        "__builtin__ eval",
        "torch load",
        "torch.hub load",
        "torch._utils.os system",
        "torch.storage _load_from_bytes",
        "torch.serialization load",
        "numpy.core.multiarray scalar",
        "numpy ndarray",
        "argparse Namespace",
        "torch.nn.modules.linear Linear",
        "\x1b[2J x",
    ],
)
def test_other_names_are_refused(tmp_path: Path, wanted: str) -> None:
    module, last = wanted.split()
    shown = f"{module}.{last}".replace("\x1b", r"\x1b").replace("__builtin__", "builtins")
    for value in (name(module, last), call(module, last), name(module, last) + b")\x81"):
        _refused(tmp_path, state((A, TWO), (text("b"), value)), "refused", shown, "weights_only=False")


def test_names_are_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own __getattr__ imports whole modules."""
    asked: list[str] = []
    monkeypatch.setattr(torch, "__getattr__", lambda name: asked.append(name) or torch.float32)
    _refused(tmp_path, state((A, name("torch", "_inductor"))), "torch._inductor")
    assert not asked


@pytest.mark.parametrize(
    "key",
    [
        DOUBLED,
        b")",
        b"]",
        b"}",
        TWO,
        b"G" + bytes(8),
        b"N",
        integer(2**2000),
        integer(2**61 - 1),
        name("torch", "int8"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_keys_are_texts_or_small_numbers(tmp_path: Path, key: bytes) -> None:
    _refused(tmp_path, state((A, TWO), (key, TWO)), "as a key")
    _refused(tmp_path, b"\x80\x02}" + key + TWO + b"s.", "as a key")
    pair = b"]" + key + b"a" + TWO + b"a"
    _refused(tmp_path, b"\x80\x02" + call("collections", "OrderedDict", b"](" + pair + b"e") + b".", "as a key")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (tensor(2, (3,)), ["number 2 of a storage of 2"]),
        (tensor(2, (2,), offset=1), ["number 2"]),
        (tensor(2, (2,), stride=(2**40,)), ["number 1099511627776"]),
        (tensor(2, (2,), stride=(2**60,)), ["strides"]),
        (tensor(2, (2,), stride=(-1,), offset=1), ["strides"]),
        (tensor(2, (2,), stride=(1, 1)), ["strides"]),
        (tensor(2, (2, 2), stride=(1,)), ["strides"]),
        (tensor(2, (-2,)), ["shape"]),
        (tensor(2, (2,), offset=-1), ["shape"]),
        (tensor(2, (2,), offset=2**62), ["shape"]),
        (tensor(2, (0, 2**47, 2**47), stride=(1, 1, 1)), ["shape"]),
        (tensor(2, (1,) * 9, stride=(1,) * 9), ["shape"]),
        (tensor(-2, (2,)), ["unknown type"]),
        (tensor(2**60, (2,)), ["unknown type"]),
        (tensor(2, (2,), kind="QUInt4x2Storage"), ["unknown type"]),
        (tensor(2, (2,), kind="load"), ["refused", "torch.load"]),
        (tensor(3, (2,)), ["8 bytes in data/0", "3 x 4"]),
        (tensor(1, (1,)), ["8 bytes in data/0", "1 x 4"]),
        (tensor(2, (2,), kind="DoubleStorage"), ["8 bytes in data/0", "2 x 8"]),
        (tensor(2, (2,), key="1"), ["data/1"]),
        (tensor(2, (2,), key="../data/0"), ["data/../data/0"]),
        (tensor(2, (1000, 1000), stride=(0, 0)), ["8 times"]),
        (tensor(2, (2,), kind="QInt32Storage"), ["quantized"]),
        (call("torch._utils", "_rebuild_tensor_v2", A, b"K\x00", b")", b")"), ["instead of a storage"]),
        (b"K\x01Q", ["persistent"]),
        (b")Q", ["persistent"]),
        (craft.tuple_of(text("module"), b"N", b"N", b"N", b"N") + b"Q", ["persistent"]),
        (craft.tuple_of(DOUBLED, DOUBLED, DOUBLED, DOUBLED, DOUBLED) + b"Q", ["persistent"]),
        (b"P0\n", ["PERSID"]),
        (b"\x8b\x00\x00\x00\x7f", ["bytes expected"]),
        (b"X\xff\xff\xff\xff", ["bytes expected"]),
        (b"I" + b"9" * 10_000 + b"\n", ["damaged"]),
        (b"L" + b"9" * 10_000 + b"L\n", ["damaged"]),
        (b"cos", ["damaged"]),
        (b"h\x09", ["KeyError"]),
        (b"K\x01)R", ["call of int"]),
        (b"tttt", ["damaged"]),
        (b"N" + TWO + b"b", ["attributes"]),
        (b"", ["keys and values"]),
    ],
    ids=lambda value: repr(value)[-40:],
)
def test_damaged_values(tmp_path: Path, value: bytes, words: list[str]) -> None:
    _refused(tmp_path, state((A, value)), *words)


def test_a_name_twice_and_a_storage_of_two_types(tmp_path: Path) -> None:
    _refused(tmp_path, state((A, TWO), (A, TWO)), "'a' twice")
    _refused(tmp_path, state((A, TWO), (text("b"), tensor(1, (1,), kind="DoubleStorage"))), "described twice")
    shared = _read(tmp_path, state((A, TWO), (text("b"), tensor(2, (1,), offset=1)))).tensors
    assert shared["a"][1:].data_ptr() == shared["b"].data_ptr()


def test_many_views_of_one_storage(tmp_path: Path) -> None:
    views = [(text(str(i)), tensor(1000, (1000,))) for i in range(100)]
    archive(tmp_path / "a.pt", state(*views), {"data/0": bytes(4000)})
    with pytest.raises(CheckpointError, match="8 times"):
        read_file(tmp_path / "a.pt")
    archive(tmp_path / "a.pt", state(*views[:3]), {"data/0": bytes(4000)})
    assert len(read_file(tmp_path / "a.pt").tensors) == 3


@pytest.mark.parametrize(
    "data",
    [
        b"]" * 10_000,
        b"(" * 10_000,
        (b"]" + MEMO) * 5000,
        PAIRS + call("collections", "OrderedDict", RECALL) * 100,
    ],
    ids=["lists", "marks", "memo", "pairs"],
)
def test_steps_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(pickled, "STEPS_LIMIT", 5000)
    _refused(tmp_path, b"\x80\x02" + data + b".", "more than 5000 steps")


def test_bytes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "SIZE_LIMIT", 1000)
    monkeypatch.setattr("tinysr_kernels.checkpoint.read.torch_file.SIZE_LIMIT", 1000)
    _refused(tmp_path, state((text("a" * 1000), TWO)), "at most 1000")
    torch.save({"a" * 1000: torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="more than 1000"):
        read_file(tmp_path / "old.pt")


def test_names_are_bounded(tmp_path: Path) -> None:
    _refused(tmp_path, state((text("a" * 1001), TWO)), "at most 1000 characters")
    assert set(_read(tmp_path, state((text("a" * 1000), TWO))).tensors) == {"a" * 1000}
