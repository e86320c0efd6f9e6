"""The project's own folded files: metadata there and back, and writing whole files or none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.checkpoint.edit import assert_same, edit_metadata, read, refused
from tests.layouts.unet import write_unet
from tinysr_kernels.checkpoint import folded, folded_metadata, write_safetensors
from tinysr_kernels.families import TinySRConfig, UNetConfig, load

TENSORS = {
    "a": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.ones(2, 2).to(torch.float8_e4m3fn),
    "d": torch.tensor([1, 2], dtype=torch.int32),
    "e": torch.zeros(0),
}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("tinysr-dit", TinySRConfig(head_dim=32, scaling_factor=0.25)),
        ("adcsr", UNetConfig()),
        ("tinysr-unet", UNetConfig(color_fix="none", groups=(4, 2, 1))),
    ],
)
def test_there_and_back(tmp_path: Path, family: str, config: TinySRConfig | UNetConfig) -> None:
    path = tmp_path / "folded.safetensors"
    write_safetensors(path, TENSORS, folded_metadata(family, config, "float16"))
    for ckpt in (path, tmp_path):
        found = load(ckpt)
        assert found.folded
        assert (found.family, found.config, found.folded_dtype) == (family, config, "float16")
        assert found.metadata["version"] == "1"
        assert {k: v.dtype for k, v in found.tensors.items()} == {k: v.dtype for k, v in TENSORS.items()}
        for name, tensor in TENSORS.items():
            assert torch.equal(found.tensors[name].double(), tensor.double())
    assert any("ignored" in n for n in load(path, embeddings=torch.ones(1, 3)).notices)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float64])
def test_not_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    broken = {**TENSORS, "f": torch.tensor([1.0, float("nan")]).to(dtype)}
    write_safetensors(tmp_path / "f.safetensors", broken, folded_metadata("adcsr", UNetConfig(), "float16"))
    refused(tmp_path / "f.safetensors", "'f'", "NaN")


def test_future_version(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    write_safetensors(path, TENSORS, folded_metadata("adcsr", UNetConfig(), "float16"))
    edit_metadata(path, version="7")
    refused(path, "version", "expected 1", "found 7", "newer")


def test_any_strides_and_shared_memory(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {"whole": base, "again": base, "turned": base.t(), "row": base[1], "lasts": base[:, ::2]}
    write_safetensors(tmp_path / "x.safetensors", tensors, {})
    assert_same(read(tmp_path / "x.safetensors")[0], tensors)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS, {"n": "1"})

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(folded.os, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_safetensors(path, {"other": torch.ones(1)}, {"n": "2"})
        assert read(path)[1]["n"] == "1"
        assert os.listdir(tmp_path) == ["x.safetensors"]
    with pytest.raises(OSError, match="nowhere"):
        write_safetensors(tmp_path / "nowhere" / "x.safetensors", TENSORS, {})


def test_readable_like_any_new_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", TENSORS, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_demo_comes_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = write_unet(tmp_path / "demo.safetensors")
    monkeypatch.setattr("tinysr_kernels.families.loading.files", lambda package: tmp_path)
    assert_same(load("demo").tensors, layout.tensors())
    layout.path.unlink()
    refused("demo", "demo.safetensors", "install")
