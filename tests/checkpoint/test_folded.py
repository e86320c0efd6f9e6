"""The project's own folded files: metadata there and back, and every kind of damage noticed and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoint.edit import assert_same, edit, edit_metadata, read, refused
from tests.layouts.tinysr import write_tinysr
from tests.layouts.unet import write_unet
from tests.layouts.weights import write_safetensors as write_plain
from tinysr_kernels import compile as compiled
from tinysr_kernels.checkpoint import folded_metadata, write_safetensors
from tinysr_kernels.checkpoint.own.manifest import check_manifest, checksum, manifest
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import TinySRConfig, UNetConfig, load

TENSORS = {
    "a.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a.bias": torch.ones(4),
    "b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "b.weight_scale": torch.ones(2),
    "c.table": torch.ones(2, 2),
}


def _write(path: Path, tensors: dict[str, Tensor] | None = None, family: str = "adcsr", config: object = None) -> Path:
    tensors = TENSORS if tensors is None else tensors
    write_safetensors(path, tensors, folded_metadata(family, config or UNetConfig(), "float16", tensors))
    return path


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("tinysr-dit", TinySRConfig(head_dim=32, scaling_factor=0.25)),
        ("adcsr", UNetConfig()),
        ("tinysr-unet", UNetConfig(color_fix="none", groups=(4, 2, 1))),
    ],
)
def test_there_and_back(tmp_path: Path, family: str, config: TinySRConfig | UNetConfig) -> None:
    path = _write(tmp_path / "folded.safetensors", family=family, config=config)
    for ckpt in (path, tmp_path):
        found = load(ckpt)
        assert found.folded
        assert (found.family, found.config, found.folded_dtype) == (family, config, "float16")
        assert found.metadata["version"] == "2"
        assert not found.notices
        assert found.file == path
        assert {k: v.dtype for k, v in found.tensors.items()} == {k: v.dtype for k, v in TENSORS.items()}
        for name, tensor in TENSORS.items():
            assert torch.equal(found.tensors[name].double(), tensor.double())
    refused(path, "the file is folded", "embeddings", embeddings=torch.ones(1, 3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A folded file of a network with each kind of folded tensor: of TinySR, and of a pruned UNet."""
    folder = tmp_path_factory.mktemp("saved")
    write_unet(folder / "unet.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4))
    write_tinysr(folder / "tinysr", dim=64, layers=1, channels=4, vae_width=4)
    for name in ("unet.safetensors", "tinysr"):
        compiled(folder / name, device="cpu").save(folder / f"folded-{name.removesuffix('.safetensors')}.safetensors")
    return {name: (folder / f"folded-{name}.safetensors").read_bytes() for name in ("unet", "tinysr")}


def _narrowed(tensor: Tensor) -> Tensor:
    return tensor.half()


def _damaged(tensor: Tensor) -> Tensor:
    """One bit of one element flipped."""
    tensor.view(torch.int32).view(-1)[-1:] ^= 1
    return tensor


@pytest.mark.parametrize("name", ["unet", "tinysr"])
@pytest.mark.parametrize("change", [None, _narrowed, lambda t: t.flatten()[:, None], lambda t: t * 1.01, _damaged])
def test_every_tensor_that_is_not_as_written(saved: dict[str, bytes], tmp_path: Path, name: str, change: Any) -> None:
    path = tmp_path / "f.safetensors"
    path.write_bytes(saved[name])
    tensors, metadata = read(path)
    for key, tensor in tensors.items():
        others = {k: v for k, v in tensors.items() if k != key}
        made = others | ({} if change is None else {key: change(tensor.clone())})
        with pytest.raises(
            CheckpointError, match=f"here: '{re.escape(key)}': expected.*found .*convert the checkpoint"
        ):
            check_manifest(metadata["tensors"], made, "here")
    write_plain(path, made, metadata)
    refused(path, str(path), repr(key), "expected", "found")


def test_tensors_that_the_metadata_do_not_list(tmp_path: Path) -> None:
    path = edit(_write(tmp_path / "f.safetensors"), lambda tensors: tensors.update(more=torch.ones(1)))
    refused(path, "'more'", "unexpected")


@pytest.mark.parametrize(
    "listed",
    ["", "[]", "{", "[" * 10_000, "\ud800", json.dumps(dict.fromkeys("abc", "x" * 99999))],
    ids=lambda t: t[:8],
)
def test_lists_that_are_none(listed: str) -> None:
    with pytest.raises(CheckpointError, match="here: metadata tensors") as caught:
        check_manifest(listed, TENSORS, "here")
    assert len(str(caught.value)) < 500
    with pytest.raises(CheckpointError, match=r"here: 'a\.bias'.*: unexpected"):
        check_manifest("{}", TENSORS, "here")
    for entry in (3, None, [], {}, "float16", ["float16", [2, 3]], [["float16"], [2, 3], 0]):
        with pytest.raises(CheckpointError, match=r"here: 'a\.weight': expected"):
            check_manifest(json.dumps(json.loads(manifest(TENSORS)) | {"a.weight": entry}), TENSORS, "here")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("a.weight", torch.ones(2, 3)),
        ("a.weight", torch.ones(2, 3, dtype=torch.int32)),
        ("a.bias", torch.ones(4, dtype=torch.float16)),
        ("b.weight", torch.ones(2, 2, dtype=torch.float16)),
        ("c.table", torch.ones(2, 2, dtype=torch.float16)),
        ("c.table", torch.ones(2, 2).to(torch.float8_e4m3fn)),
    ],
)
@pytest.mark.parametrize("version", ["1", "2"])
def test_dtypes_that_no_folded_file_has(tmp_path: Path, name: str, tensor: Tensor, version: str) -> None:
    """Also where the list agrees: somebody may have written it anew, and files of version 1 have none."""
    path = edit_metadata(_write(tmp_path / "f.safetensors", TENSORS | {name: tensor}), version=version)
    refused(path, repr(name), "folded for float16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn])
def test_not_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "a.weight" if dtype == torch.float16 else "b.weight"
    broken = TENSORS | {name: torch.full((2, 2), float("nan")).to(dtype)}
    refused(_write(tmp_path / "f.safetensors", broken), repr(name), "NaN")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("version", "7", ["expected 2", "found 7", "newer"]),
        ("version", "0", ["expected 2", "found 0"]),
        ("version", "1e9", ["expected a number"]),
        ("dtype", "int8", ["metadata dtype", "int8"]),
        ("dtype", None, ["metadata dtype"]),
        ("folded", "yes", ["metadata folded"]),
        ("tensors", None, ["metadata tensors"]),
        ("config", None, ["metadata config"]),
        ("config", "{" + " " * 70_000 + "}", ["metadata config", "65536 characters"]),
        ("family", "unknown", ["metadata family"]),
    ],
)
def test_metadata(tmp_path: Path, key: str, value: str | None, words: list[str]) -> None:
    refused(edit_metadata(_write(tmp_path / "f.safetensors"), **{key: value}), *words)


def test_version_1_loads_with_a_notice_and_is_brought_up_by_saving(saved: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    path.write_bytes(saved["unet"])
    expected = load(path).tensors
    edit_metadata(path, version="1", tensors=None)
    old = compiled(path, device="cpu")
    assert any("listed no tensors" in notice and "tinysr convert" in notice for notice in old.notices)
    old.save(tmp_path / "new.safetensors")
    new = load(tmp_path / "new.safetensors")
    assert not new.notices
    assert_same(new.tensors, expected)
    path.write_bytes(saved["unet"])
    assert read(tmp_path / "new.safetensors")[1] == read(path)[1]


def test_checksums_are_of_the_bytes_in_row_major_order() -> None:
    a = torch.arange(6, dtype=torch.float16).reshape(2, 3)
    assert checksum(a) == checksum(a.T.contiguous().T) != checksum(a.T)
    assert checksum(torch.zeros(0)) == "00000000"
    assert json.loads(manifest({"a": torch.tensor([1.0])})) == {"a": ["float32", [1], "aca16a6a"]}


@pytest.mark.parametrize("change", ["gone", "flat", "empty", "scalar"])
def test_tensors_that_do_not_fit_together(saved: dict[str, bytes], tmp_path: Path, change: str) -> None:
    """Where the list was written anew to fit them, the network is what refuses them."""
    path = tmp_path / "f.safetensors"
    path.write_bytes(saved["tinysr"])
    tensors, metadata = read(path)
    ways = {"flat": Tensor.flatten, "empty": lambda t: t[:0], "scalar": lambda t: t.flatten()[0]}
    # one of each kind of name; a bias or gate is optional, and a vector is flat already
    kinds = {re.sub(r"[0-9]+", "0", key): key for key, tensor in tensors.items() if tensor.dim() > 1}
    for key in kinds.values():
        made = {k: ways[change](v) if k == key else v for k, v in tensors.items() if k != key or change != "gone"}
        write_plain(path, made, metadata | {"tensors": manifest(made)})
        with pytest.raises(CheckpointError):
            compiled(path, device="cpu")


def test_demo_comes_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_unet(tmp_path / "demo.safetensors")
    monkeypatch.setattr("tinysr_kernels.families.loading.files", lambda package: tmp_path)
    assert_same(load("demo").tensors, layout.tensors())
    layout.path.unlink()
    refused("demo", "demo.safetensors", "install")
