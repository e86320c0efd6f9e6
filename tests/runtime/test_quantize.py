"""compile(quantize="fp8"): from a public checkpoint, from a folded file, saved and loaded; where it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinysr_kernels
from tests.layouts.adcsr import write_adcsr
from tests.layouts.tinysr import write_tinysr
from tests.layouts.weights import random_image
from tinysr_kernels.checkpoint.own.manifest import manifest
from tinysr_kernels.cli.main import main
from tinysr_kernels.errors import CheckpointError, InputError
from tinysr_kernels.families import TinySRConfig
from tinysr_kernels.launch.device import Gpu, assume

E4M3 = torch.float8_e4m3fn
SMALL = TinySRConfig(head_dim=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1), scaling_factor=0.7)


def tinysr(folder: Path) -> Path:
    """One block of 64 channels on 8x8 tokens, which an image of 8x8 fills."""
    write_tinysr(folder, dim=64, layers=1, pooled_dim=24, channels=4, vae_width=10, config=SMALL)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinysr(tmp_path_factory.mktemp("public"))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_fp8_is_near_and_says_so(folder: Path) -> None:
    lr = random_image(11, 14)
    whole, quantized = (tinysr_kernels.compile(folder, quantize=q) for q in (None, "fp8"))
    assert 0 < relative(quantized(lr), whole(lr)) < 0.05
    assert (whole.info()["quantize"], quantized.info()["quantize"]) == (None, "fp8")
    run = {call.op for call in quantized.launches}
    assert {"layer_norm_quantize", "quantize_rows", "linear_fp8", "linear_fp8_quantized"} <= run
    assert "linear" not in run
    assert torch.equal(quantized(lr), quantized(lr))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saved_and_loaded_it_is_the_same(folder: Path, tmp_path: Path, dtype: str) -> None:
    """Without being told again, and in e4m3 on disk."""
    path = tmp_path / "fp8.safetensors"
    model = tinysr_kernels.compile(folder, dtype=dtype, quantize="fp8")
    model.save(path)
    stored = load_file(path)
    assert sum(t.dtype == E4M3 for t in stored.values()) == 4
    lr = random_image(8, 8)
    for options in ({}, {"quantize": "fp8"}):
        again = tinysr_kernels.compile(path, dtype=dtype, **options)
        assert again.info()["quantize"] == "fp8"
        assert torch.equal(again(lr), model(lr))
    with safe_open(path, "pt") as file:
        assert file.metadata()["quantize"] == "fp8"
    again.save(tmp_path / "twice.safetensors")
    twice = load_file(tmp_path / "twice.safetensors")
    assert all(torch.equal(t.float(), twice[name].float()) for name, t in stored.items())


@pytest.mark.long
def test_a_folded_file_is_quantized_on_request(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "folded.safetensors"
    tinysr_kernels.compile(folder).save(path)
    lr = random_image(8, 8)
    exact, direct, later = (
        tinysr_kernels.compile(ckpt, quantize=q)(lr) for ckpt, q in ((folder, None), (folder, "fp8"), (path, "fp8"))
    )
    assert relative(later, direct) < relative(direct, exact)


@pytest.mark.long
def test_the_kernels_compute_what_the_cpu_emulates(folder: Path) -> None:
    """The whole network in the interpreter: apart only where a sum that rounds otherwise tips an e4m3 rounding."""
    lr = random_image(8, 8)[0]
    emulated = tinysr_kernels.compile(folder, dtype="float32", quantize="fp8", backend="reference")
    exact = tinysr_kernels.compile(folder, dtype="float32", backend="reference")
    with assume(Gpu("a GPU of one multiprocessor", (9, 0), 1)):
        kernels = tinysr_kernels.compile(folder, dtype="float32", quantize="fp8", backend="triton")
        found = kernels(lr)
    assert {call.source for call in kernels.launches if "fp8" in call.op or "quantize" in call.op} == {"heuristic"}
    assert relative(found, emulated(lr)) < relative(emulated(lr), exact(lr)) / 10


@pytest.mark.parametrize("capability", [(8, 0), (8, 6)])
def test_older_gpus_are_refused_by_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    """Before anything is folded or placed, for public checkpoints and for files that are quantized already."""
    path = tmp_path / "fp8.safetensors"
    tinysr_kernels.compile(folder, quantize="fp8").save(path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old Card")
    found = ".".join(map(str, capability))
    for ckpt, options in ((folder, {"quantize": "fp8"}), (path, {})):
        with pytest.raises(InputError, match=rf"8\.9 or higher, Old Card has {found}.*device='cpu'"):
            tinysr_kernels.compile(ckpt, device="cuda", **options)


def test_other_families_and_values_are_refused_by_name(tmp_path: Path) -> None:
    write_adcsr(tmp_path)
    for ckpt, family in ((tmp_path, "adcsr"), ("demo", "tinysr-unet")):
        with pytest.raises(InputError, match=f"this checkpoint is {family}"):
            tinysr_kernels.compile(ckpt, quantize="fp8")
    with pytest.raises(InputError, match=r"quantize must be one of \(None, 'fp8'\), found 'int4'"):
        tinysr_kernels.compile("demo", quantize="int4")


LINEAR = "transformer.blocks.0.ff1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{LINEAR}.weight_scale"), rf"{LINEAR}\.weight"),
        (lambda t: t.update({f"{LINEAR}.weight_scale": torch.ones(3)}), "fit together.*weight_scale"),
        (
            lambda t: t.update({f"{LINEAR}.weight": t[f"{LINEAR}.weight"].float()}),
            "expected torch.float8_e4m3fn",
        ),
        (lambda t: t.update({f"{LINEAR}.gate": torch.ones(256)}), rf"{LINEAR}\.gate"),
        (lambda t: t.update({f"{LINEAR}.weight": t[f"{LINEAR}.weight"].fill_(float("nan"))}), "NaN"),
    ],
    ids=["no scale", "short scale", "another dtype", "surplus", "NaN"],
)
def test_damaged_files_are_refused(
    folder: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    path = tmp_path / "fp8.safetensors"
    tinysr_kernels.compile(folder, quantize="fp8").save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata | {"tensors": manifest(tensors)})  # a list that fits: the network must notice
    with pytest.raises(CheckpointError, match=message):
        tinysr_kernels.compile(path)


@pytest.mark.long
def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """convert stores it, info names it, upscale runs it: from the file as on request."""
    path, picture = tmp_path / "fp8.safetensors", tmp_path / "small.png"
    assert main(["convert", str(folder), str(path), "--quantize", "fp8"]) == 0
    assert main(["info", str(path)]) == 0
    assert "4 linears in e4m3" in capsys.readouterr().out
    pixels = random_image(8, 9)[0].permute(1, 2, 0).mul(255).byte().numpy()
    Image.fromarray(pixels).save(picture)
    results = [tmp_path / name for name in ("file.png", "request.png", "whole.png")]
    for result, options in zip(results, ([str(path)], [str(folder), "--quantize", "fp8"], [str(folder)]), strict=True):
        assert main(["upscale", str(picture), "-o", str(result), "--device", "cpu", "-q", "--model", *options]) == 0
    first, second, third = (Image.open(result).tobytes() for result in results)
    assert first == second
    assert first != third
    assert main(["convert", "demo", str(tmp_path / "x.safetensors"), "--quantize", "fp8"]) == 2
    assert "tinysr-unet" in capsys.readouterr().err
