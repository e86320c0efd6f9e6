"""`tinysr convert` and `info` on files: what they write, and above all what they never do."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tests.checkpoint.edit import edit, edit_metadata, read
from tests.layouts.unet import write_unet
from tinysr_kernels.cli.main import main
from tinysr_kernels.families import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a checkpoint in it, as a user may have it."""
    write_unet(tmp_path / "in" / "model.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4))
    return tmp_path / "in"


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_convert(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(folder), str(out), "--dtype", "float16"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert (load(out).folded, load(out).folded_dtype) == (True, "float16")
    assert main(["convert", str(folder), str(out)]) == 2
    assert "--force" in capsys.readouterr().err
    assert read(out)[1]["dtype"] == "float16"
    assert main(["convert", str(folder), str(out), "--force"]) == 0
    assert read(out)[1]["dtype"] == "float32"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_no_source_and_no_foreign_file_is_replaced(
    folder: Path, tmp_path: Path, force: list[str], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = folder / "model.safetensors"
    assert main(["convert", str(folder), "folded.safetensors"]) == 0
    os.link(model, "hard.safetensors")
    os.link("folded.safetensors", "again.safetensors")
    Path("link.safetensors").symlink_to(model)
    Path("way").symlink_to("in")
    Path("text.safetensors").write_text("precious")
    before = _contents(tmp_path)
    for ckpt, out in (
        (str(folder), str(model)),
        (str(model), str(model)),
        ("in", "in/model.safetensors"),
        ("in", "in/../in/model.safetensors"),
        ("way", "in/model.safetensors"),
        ("in", "way/model.safetensors"),
        (str(folder), "hard.safetensors"),
        (str(folder), "link.safetensors"),
        ("folded.safetensors", "folded.safetensors"),
        ("folded.safetensors", "again.safetensors"),
        ("demo", "text.safetensors"),
        ("demo", "in"),
        ("demo", ""),
        ("demo", "-"),
        ("demo", "no/out.safetensors"),
    ):
        assert main(["convert", ckpt, out, *force]) == 2, (ckpt, out)
        assert "tinysr: error: " in capsys.readouterr().err
    assert _contents(tmp_path) == before


def test_weights_that_overflow_once_folded_are_refused_with_the_way_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """40,000 is finite in half precision, and twice as much, for the range map, is not."""
    edit(folder / "model.safetensors", lambda tensors: tensors["unet.conv_in.pointwise.weight"].fill_(40_000.0))
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(folder), str(out), "--dtype", "float16"]) == 2
    message = capsys.readouterr().err
    assert "unet.conv_in.weight" in message
    assert "float16" in message
    assert "dtype='bfloat16'" in message
    assert not out.exists()
    assert main(["convert", str(folder), str(out), "--dtype", "bfloat16"]) == 0
    assert main(["info", str(out)]) == 0


def test_weights_that_overflow_in_every_dtype(folder: Path, capsys: pytest.CaptureFixture) -> None:
    def huge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["unet.conv_in.depthwise.weight"].fill_(3e38)
        tensors["unet.conv_in.pointwise.weight"].fill_(3e38)

    edit(folder / "model.safetensors", huge)
    assert main(["info", str(folder)]) == 2
    assert "not finite once folded and rounded to float32; use dtype='float64'" in capsys.readouterr().err


def test_info_quotes_what_a_terminal_would_obey(folder: Path, capsys: pytest.CaptureFixture) -> None:
    odd = folder.with_name("a\x1b[2Jb\u202e\udce9")
    folder.rename(odd)
    for options in ([], ["--json"]):
        assert main(["info", str(odd), *options]) == 0
        text = capsys.readouterr().out
        assert text.replace("\n", "").isprintable()
        assert r"a\x1b[2Jb\u202e\udce9" in (json.loads(text)["source"] if options else text)


def test_info_of_a_hostile_configuration(folder: Path, capsys: pytest.CaptureFixture) -> None:
    for blocks in ([2147483647], [1] * 100_000, [[1]], ["\x1b[2J"]):
        config = json.dumps({"input": "vae", "encoder_blocks": blocks})
        edit_metadata(folder / "model.safetensors", config=config)
        assert main(["info", str(folder)]) == 2
        message = capsys.readouterr().err
        assert "config" in message
        assert len(message) < 2100
        assert message.strip().isprintable()
