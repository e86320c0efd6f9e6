"""Files of torch.save, both formats: read as torch.load reads them, and refused where records and tensors disagree."""

from __future__ import annotations

import collections
import io
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.read.craft import archive, state, tensor, text
from tinysr_kernels.checkpoint.read import archive as archives
from tinysr_kernels.checkpoint.read.tensor_file import read_file
from tinysr_kernels.errors import CheckpointError

OLD = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32,
       torch.int64, torch.bool, torch.complex64, torch.complex128)  # fmt: skip
NEW = (torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2)
TWO = state((text("a"), tensor(2, (2,))))


def _refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    for word in (path.name, *words):
        assert word in str(caught.value), str(caught.value)


def _tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(24.0).reshape(2, 3, 4)
    with_attribute = torch.ones(3)
    with_attribute.note = "x"  # type: ignore[attr-defined]
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    return {
        "base": base,
        "permuted": base.permute(2, 0, 1),
        "row": base[1, 1:],
        "expanded": torch.ones(1).expand(5),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.0),
        "attribute": with_attribute,
        "parameter": parameter,
        "again": parameter,
        "transposed": parameter.data.t(),
        **torch.nn.Linear(3, 2).state_dict(),
    }


def _extras() -> dict[str, Any]:
    """What lies in training checkpoints, and weights_only loads."""
    return {
        "epoch": 3,
        "numbers": [2**40, -5, 1.5, None, True, (1, 2, 3, 4, 5)],
        "bytes": [b"abc", bytearray(4), {1, 2}, 1j, collections.Counter("aab"), collections.OrderedDict(a=1)],
        "torch": [torch.Size((1, 2)), torch.device("cuda:0"), torch.float16, torch.strided],
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "odd": [torch.eye(3).to_sparse(), torch.ones(2, device="meta")],
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("lightning", [True, False])
def test_the_same_as_torch_load(tmp_path: Path, zipped: bool, lightning: bool) -> None:
    tensors = _tensors() | {str(dtype): torch.ones(5).to(dtype) for dtype in (*OLD, *(NEW if zipped else ()))}
    saved = {"state_dict": tensors, **_extras()} if lightning else tensors
    torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    expected = torch.load(tmp_path / "a.pt", weights_only=True)
    found = read_file(tmp_path / "a.pt")
    assert not found.others
    assert list(found.tensors) == list(tensors)
    for name, one in (expected["state_dict"] if lightning else expected).items():
        mine = found.tensors[name]
        assert (mine.dtype, mine.shape, mine.requires_grad) == (one.dtype, one.shape, False)
        assert mine.stride() == one.stride() or not mine.numel()
        assert mine.to(torch.complex128).equal(one.to(torch.complex128)), name
    assert found.tensors["parameter"].data_ptr() == found.tensors["again"].data_ptr()


def test_what_is_beside_the_tensors_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1), **{k: v for k, v in _extras().items() if k != "odd"}, 3: 4}, tmp_path / "a.pkl")
    assert read_file(tmp_path / "a.pkl").others == {
        "epoch": "int", "numbers": "list", "bytes": "list", "torch": "list", "optimizer": "dict", "3": "int"
    }  # fmt: skip


def test_a_tensor_is_named_after_its_file(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "pool_embeds.pt")
    assert read_file(tmp_path / "pool_embeds.pt").tensors["pool_embeds"].tolist() == [1, 1]


def test_writing_to_a_tensor_leaves_the_file(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    read_file(tmp_path / "a.pt").tensors["a"].zero_()
    assert (tmp_path / "a.pt").read_bytes() == before


# ------------------------------------------------------------------------------------------------ zip
@pytest.mark.parametrize(
    ("records", "words"),
    [
        ({}, ["0 bytes in data/0", "2 x 4"]),
        ({"data/0": bytes(7)}, ["7 bytes in data/0"]),
        ({"data/0": bytes(4), "data/1": bytes(4)}, ["4 bytes in data/0"]),
        ({"data/0": bytes(1000)}, ["1000 bytes in data/0"]),
        ({"data/1": bytes(8)}, ["0 bytes in data/0"]),
        ({"data/0": bytes(8), "code/__torch__.py": b"1"}, ["TorchScript"]),
        ({"data/0": bytes(8), "constants.pkl": b"1"}, ["TorchScript"]),
    ],
)
def test_records_have_their_tensors_sizes(tmp_path: Path, records: dict[str, bytes], words: list[str]) -> None:
    _refused(archive(tmp_path / "a.pt", TWO, records), *words)


def test_byte_order(tmp_path: Path) -> None:
    values = struct.pack(">2f", 1.5, -2.0)
    path = archive(tmp_path / "a.pt", TWO, {"data/0": values, "byteorder": b"big"})
    assert read_file(path).tensors["a"].tolist() == [1.5, -2.0]


def test_data_out_of_step_with_its_type(tmp_path: Path) -> None:
    for i in range(8):  # the record begins at any address
        path = archive(tmp_path / f"{i}.pt", TWO, {"x" * i: b"", "data/0": struct.pack("<2f", 1.5, -2.0)})
        assert read_file(path).tensors["a"].tolist() == [1.5, -2.0]


def test_archives_of_two_readings(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", TWO)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as more:
        more.writestr("archive/data/0", struct.pack("<2f", 1, 2))
    _refused(path, "twice")
    archive(path, TWO)
    with zipfile.ZipFile(path, "a") as more:
        more.writestr("other/data/0", struct.pack("<2f", 1, 2))
    _refused(path, "second archive")


def test_a_record_in_anothers_place(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", TWO, {"data/0": bytes(8), "data/1": b"PK\3\4" + bytes(40)})
    data = bytearray(path.read_bytes())
    directory = data.rindex(b"PK\1\2")  # of data/1: begin where data/0 begins
    first = data.index(b"PK\3\4", 4)
    data[directory + 42 : directory + 46] = struct.pack("<I", first)
    path.write_bytes(data)
    _refused(path, "data/", "reaches into the next one")
    data[directory + 42 : directory + 46] = struct.pack("<I", first + 1)
    path.write_bytes(data)
    _refused(path, "damaged")
    data[directory + 42 : directory + 46] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    _refused(path, "damaged")


def test_a_damaged_pickle_record_is_seen(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", TWO)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"cpu", b"gpu"))
    _refused(path, "checksum")


def test_encrypted_and_compressed_archives(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", TWO)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    _refused(path, "encrypted", "as safetensors")


def test_directories_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.pt", TWO, {f"data/{i}": bytes(8) for i in range(20)})
    assert read_file(path).tensors
    monkeypatch.setattr(archives, "DIRECTORY_LIMIT", 1000)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # not even looked at
    _refused(path, "directory claims")
    path.write_bytes(path.read_bytes() + b"more")
    _refused(path, "no directory")


def test_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = archive(tmp_path / "a.pt", TWO, {"data/0": struct.pack("<2f", 1.5, -2.0)})
    data = path.read_bytes()
    assert data.count(b"PK\6\6") == 1
    path.write_bytes(data[:-10] + bytes(4) + data[-6:])  # its size is in the wide record alone
    assert read_file(path).tensors["a"].tolist() == [1.5, -2.0]
    monkeypatch.setattr(archives, "DIRECTORY_LIMIT", 10)
    _refused(path, "directory claims")


# --------------------------------------------------------------------------------------- the older stream
def _stream(value: object) -> bytes:
    written = io.BytesIO()
    torch.save(value, written, _use_new_zipfile_serialization=False)
    return written.getvalue()


@pytest.mark.parametrize("numel", [1, 3, 2**40, 2**63])
def test_sizes_in_the_older_stream(tmp_path: Path, numel: int) -> None:
    data = _stream({"a": torch.ones(2)})
    (tmp_path / "a.pt").write_bytes(data[:-16] + struct.pack("<Q", numel) + data[-8:])
    _refused(tmp_path / "a.pt", "another size")


@pytest.mark.parametrize("missing", [1, 8, 12, 16, 17])
def test_the_older_stream_cut_off(tmp_path: Path, missing: int) -> None:
    (tmp_path / "a.pt").write_bytes(_stream({"a": torch.ones(2)})[:-missing])
    _refused(tmp_path / "a.pt")


def test_keys_in_the_older_stream(tmp_path: Path) -> None:
    data = _stream({"a": torch.ones(2)})
    keys = data.rindex(b"\x80\x02")
    for other in (b"\x80\x02].", b"\x80\x02N.", b"\x80\x02]K\x01a.", b"\x80\x02]X\x01\x00\x00\x00aa."):
        (tmp_path / "a.pt").write_bytes(data[:keys] + other + data[-16:])
        _refused(tmp_path / "a.pt", "other storages")


def test_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with tarfile.open(path, "w") as written:
        written.addfile(tarfile.TarInfo("storages"))
    _refused(path, "as safetensors")
    for data in (b"\x80\x02K\x01.", b"\x80\x02N.", b"\x80\x04\x95", b"<html>not found</html>", b"PK\x03\x04", b"."):
        path.write_bytes(data)
        _refused(path, "as safetensors")
