"""Files of tensors are written whole or not at all, and never in the place of a file that they must not replace."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.edit import assert_same, read
from tests.layouts.unet import write_unet
from tinysr_kernels import compile as compiled
from tinysr_kernels.checkpoint import folded, write_safetensors
from tinysr_kernels.errors import CheckpointError, InputError

TENSORS = {"a": torch.arange(6, dtype=torch.float16).reshape(2, 3), "b": torch.zeros(0)}


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

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(folded.os, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                write_safetensors(path, {"other": torch.ones(1)}, {"n": "2"})
            patch.setattr(folded.os, name, full)
            with pytest.raises(CheckpointError, match=r"x\.safetensors cannot be written: .*No space left.* Free some"):
                write_safetensors(path, {"other": torch.ones(1)}, {"n": "2"})
        assert read(path)[1]["n"] == "1"
        assert os.listdir(tmp_path) == ["x.safetensors"]


def test_file_and_folder_are_synchronized_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(folded.os, "fsync", lambda file: (steps.append("fsync"), fsync(file))[1])
    monkeypatch.setattr(folded.os, "replace", lambda a, b: (steps.append("replace"), replace(a, b))[1])
    write_safetensors(tmp_path / "x.safetensors", TENSORS, {})
    assert steps == ["fsync", "replace", "fsync"]


def test_readable_like_any_new_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", TENSORS, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


class _Path:
    def __fspath__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "ending in .safetensors"),
        ("-", "ending in .safetensors"),
        (".", "ending in .safetensors"),
        (".safetensors", "ending in .safetensors"),
        ("out", "ending in .safetensors"),
        ("out.pt", "ending in .safetensors"),
        ("out.safetensors/", "ending in .safetensors"),
        ("folder.safetensors", "is a folder"),
        ("link.safetensors", "is a link"),
        ("loop.safetensors", "is a link"),
        ("nowhere.safetensors", "is a link"),
        ("pipe.safetensors", "pipe"),
        ("no/out.safetensors", "no folder"),
        ("file/out.safetensors", "no folder"),
        ("a\0.safetensors", ""),
        ("x" * 300 + ".safetensors", ""),
        ("\x1b[2J/x.safetensors", "no folder"),
        (b"out.safetensors", "ending in .safetensors"),
        (3, "found int"),
        (None, "found NoneType"),
        (_Path(), "found _Path"),
    ],
)
def test_targets_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.safetensors").mkdir()
    write_safetensors("real.safetensors", TENSORS, {})
    Path("link.safetensors").symlink_to("real.safetensors")
    Path("loop.safetensors").symlink_to("loop.safetensors")
    Path("nowhere.safetensors").symlink_to("nowhere")
    os.mkfifo("pipe.safetensors")
    Path("file").touch()
    before = sorted(os.listdir())
    with pytest.raises((InputError, CheckpointError)) as caught:
        write_safetensors(name, TENSORS, {})
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert sorted(os.listdir()) == before


def test_only_another_folded_file_is_replaced(tmp_path: Path) -> None:
    source = write_unet(tmp_path / "own.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4)).path
    folded_file, other = tmp_path / "folded.safetensors", tmp_path / "other.safetensors"
    model = compiled(source, device="cpu")
    model.save(folded_file)
    model.save(other)
    again = compiled(folded_file, device="cpu", dtype="float64")
    os.link(folded_file, tmp_path / "hard.safetensors")
    (tmp_path / "foreign.safetensors").write_bytes(b"precious")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, words in (
        (source, "no folded file"),
        (tmp_path / "foreign.safetensors", "no folded file"),
        (folded_file, "the checkpoint itself"),
        (tmp_path / "hard.safetensors", "the checkpoint itself"),
        (tmp_path / "." / "folded.safetensors", "the checkpoint itself"),
    ):
        with pytest.raises(InputError, match=words):
            again.save(path)
    with pytest.raises(InputError, match="exists"):
        again.save(other, replace=False)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    again.save(other)
    assert read(other)[1]["dtype"] == "float64"


def test_a_file_that_appears_while_another_is_written_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_unet(tmp_path / "own.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4)).path
    model, target = compiled(source, device="cpu"), tmp_path / "new.safetensors"
    monkeypatch.setattr(folded.os, "fsync", lambda file: target.write_bytes(b"precious"))
    with pytest.raises(InputError, match="no folded file"):
        model.save(target)
    assert target.read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["new.safetensors", "own.safetensors"]
