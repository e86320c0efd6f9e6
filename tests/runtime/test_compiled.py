"""compile() on every checkpoint layout, against the reference pipelines; the compiled model's own promises."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import tinysr_kernels
from tests import ROOT
from tests.layouts.adcsr import write_adcsr
from tests.layouts.tinysr import write_tinysr
from tests.layouts.unet import write_unet
from tinysr_kernels.checkpoint.own.manifest import manifest
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch import configs

PHOTO = ROOT / "docs" / "photos"


def image(height: int, width: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


TINYSR = {
    "pooled": {},
    "pooled, LoRA": {"lora": 5, "leftovers": True},
    "temb": {"conditioning": "temb", "decoys": True},
    "buffers": {"conditioning": "buffers", "decoys": True, "leftovers": True},
    "sharded": {"sharded": True, "lora": True},
    "bin": {"as_bin": True},
    "sharded bin": {"as_bin": True, "sharded": True},
    "float16": {"dtype": torch.float16, "separable_decoder": True},
}


@pytest.mark.parametrize("layout", TINYSR)
def test_tinysr_layouts_enlarge_as_the_public_code_does(layout: str, tmp_path: Path) -> None:
    written = write_tinysr(tmp_path, **TINYSR[layout])
    model = tinysr_kernels.compile(tmp_path)
    assert model.family == "tinysr-dit"
    lr = image(37, 45, batch=2)  # several windows in both axes, odd sides
    expected = written.upscale(lr.double())
    assert relative(model(lr), expected) < 1e-4


def test_windows_of_the_release_s_overlap_still_move_on(tmp_path: Path) -> None:
    """A window of 8 latent pixels, of which 8 would overlap."""
    write_tinysr(tmp_path, table=4)
    model = tinysr_kernels.compile(tmp_path)
    found = model(image(37, 45))
    assert found.shape == (1, 3, 148, 180)
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
def test_tinysr_color_fixes(color_fix: tinysr_kernels.families.ColorFix, tmp_path: Path) -> None:
    written = write_tinysr(tmp_path)
    model = tinysr_kernels.compile(tmp_path, color_fix=color_fix)
    lr = image(32, 33)
    assert relative(model(lr), written.upscale(lr.double(), color_fix)) < 1e-4


def test_adcsr_enlarges_as_the_public_code_does(tmp_path: Path) -> None:
    written = write_adcsr(tmp_path)
    model = tinysr_kernels.compile(tmp_path)
    assert model.family == "adcsr"
    lr = image(21, 33)
    assert relative(model(lr), written.upscale(lr.double())) < 1e-4


def test_own_layout_enlarges_as_its_reference_does(tmp_path: Path) -> None:
    written = write_unet(tmp_path / "model.safetensors")
    model = tinysr_kernels.compile(tmp_path / "model.safetensors")
    assert model.family == "tinysr-unet"
    lr = image(19, 30)
    assert relative(model(lr), written.upscale(lr.double())) < 1e-4


@pytest.mark.parametrize("write", [write_tinysr, write_adcsr], ids=["tinysr", "adcsr"])
def test_saved_models_load_without_folding_and_give_the_same(write, tmp_path: Path) -> None:
    write(tmp_path / "public")
    model = tinysr_kernels.compile(tmp_path / "public")
    model.save(tmp_path / "folded.safetensors")
    again = tinysr_kernels.compile(tmp_path / "folded.safetensors")
    lr = image(32, 32)
    assert torch.equal(model(lr), again(lr))
    assert again.info()["parameters"] == model.info()["parameters"]
    again.save(tmp_path / "twice.safetensors")
    first, second = (load_file(tmp_path / name) for name in ("folded.safetensors", "twice.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def demo() -> tinysr_kernels.CompiledSR:
    return tinysr_kernels.compile("demo", device="cpu")


def test_the_demo_takes_every_kind_of_image(demo: tinysr_kernels.CompiledSR) -> None:
    array = (image(13, 22)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    large = demo(array)
    assert large.dtype == np.uint8
    assert large.shape == (52, 88, 3)
    picture = demo(Image.fromarray(array))
    assert np.array_equal(np.asarray(picture), large)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    assert np.array_equal(demo(tensor).permute(1, 2, 0).numpy(), large)
    batch = demo(torch.stack([tensor, tensor.flip(2)]))
    assert np.array_equal(batch[0].permute(1, 2, 0).numpy(), large)


@settings(max_examples=12, deadline=None)
@given(
    long=st.integers(1, 300),
    short=st.integers(1, 40),
    upright=st.booleans(),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
)
def test_any_size_and_mode_comes_back_four_times_larger(
    demo: tinysr_kernels.CompiledSR, long: int, short: int, upright: bool, mode: str
) -> None:
    size = (short, long) if upright else (long, short)
    noise = (image(size[1], size[0])[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    picture = Image.fromarray(noise).convert("L" if mode == "I;16" else "RGB").convert(mode)
    large = demo(picture)
    assert large.size == (4 * size[0], 4 * size[1])
    assert large.mode == {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
def test_arrays_keep_their_type(demo: tinysr_kernels.CompiledSR, dtype: str) -> None:
    pixels = image(9, 14)[0].permute(1, 2, 0).numpy()
    top = np.iinfo(dtype).max if dtype.startswith("uint") else 1
    large = demo((pixels * top).astype(dtype))
    assert large.dtype == dtype
    assert large.shape == (36, 56, 3)
    reference = demo(pixels.astype(np.float32))
    assert np.abs(large.astype(np.float64) / top - reference).max() < (0.05 if dtype == "uint8" else 0.02)


def test_one_by_one_equals_the_batch(demo: tinysr_kernels.CompiledSR) -> None:
    lr = image(24, 18, batch=3)
    singles = torch.stack([demo(one) for one in lr])
    torch.testing.assert_close(demo(lr), singles, rtol=0, atol=2e-6)


def test_the_same_input_gives_the_same_bits(demo: tinysr_kernels.CompiledSR) -> None:
    lr = image(40, 24)
    assert torch.equal(demo(lr), demo(lr))


def test_threads_do_not_mix_their_results(demo: tinysr_kernels.CompiledSR) -> None:
    inputs = [image(16 + 2 * i, 20, seed=i) for i in range(6)]
    expected = [demo(lr) for lr in inputs]
    found: dict[int, Tensor] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = demo(inputs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, large in enumerate(expected):
        torch.testing.assert_close(found[i], large, rtol=0, atol=2e-6)


def test_tiles_of_the_demo_hardly_differ_from_the_whole(demo: tinysr_kernels.CompiledSR) -> None:
    """GroupNorm's statistics differ from tile to tile; the differences must stay far below what an eye sees."""
    with Image.open(min(PHOTO.glob("*.*g"))) as photo:
        small = photo.convert("RGB").crop((0, 0, 120, 120))
    tiled = tinysr_kernels.compile("demo", device="cpu", tile=64)
    a, b = (np.asarray(model(small), dtype=np.float64) for model in (demo, tiled))
    assert np.sqrt(np.mean((a - b) ** 2)) < 2
    # no seam: the jump across a tile's edge is no larger than that of the whole image's
    for edge in (64 * 4, 56 * 4):
        jump = np.abs(np.diff(b, axis=1))[:, edge - 1].mean()
        assert jump < np.abs(np.diff(a, axis=1))[:, edge - 1].mean() + 1


def test_stream_and_warmup(demo: tinysr_kernels.CompiledSR) -> None:
    frames = [image(16, 16, seed=i)[0] for i in range(3)]
    for frame, large in zip(frames, demo.stream(iter(frames)), strict=True):
        assert torch.equal(large, demo(frame))
    demo.warmup([(16, 16), (2, 8, 8)])
    with pytest.raises(InputError, match="shape"):
        demo.warmup([(0, 4)])


def test_info_counts(demo: tinysr_kernels.CompiledSR) -> None:
    info = demo.info()
    assert info["family"] == "tinysr-unet"
    assert info["parameters"] == sum(t.numel() for t in demo._folded.values())
    assert info["macs_128x128"] > 1e8
    assert info["launches_per_image"] == len(demo.launches)
    assert tinysr_kernels.describe("demo")["macs_128x128"] == info["macs_128x128"]


def test_half_precision_is_near(demo: tinysr_kernels.CompiledSR) -> None:
    lr = image(24, 24)
    half = tinysr_kernels.compile("demo", device="cpu", dtype="bfloat16")
    assert half.info()["dtype"] == "bfloat16"
    with configs.given_pdl(True):
        assert half.info()["programmatic_dependent_launch"] is False  # on a CPU nothing is launched
    assert (half(lr) - demo(lr)).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "cuda:99"}, "cuda"),
        ({"device": "tpu"}, "unknown"),
        ({"dtype": "int8"}, "dtype"),
        ({"backend": "fast"}, "backend"),
        ({"quantize": "fp8"}, "quantize"),
        ({"color_fix": "sepia"}, "color_fix"),
        ({"upscale": 2}, "enlarges by 4"),
        ({"upscale": 4.0}, "whole number"),
        ({"tile": 3}, "tile"),
        ({"max_graph_shapes": 0}, "max_graph_shapes"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tinysr_kernels.compile("demo", **arguments)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("unet.conv_norm_out.bias"), "unet.conv_norm_out.bias"),
        (lambda t: t.update({"unet.mid_block.extra": torch.zeros(3)}), "unet.mid_block.extra"),
        (lambda t: t.update({"unet.conv_norm_out.bias": torch.zeros(3)}), r"fit together.*bias"),
        (lambda t: t.update({"decoder.conv_out.weight": torch.zeros(3, 5, 3, 3)}), "fit together.*weight"),
        (lambda t: t.update({"unet.conv_in.weight": torch.zeros(4)}), "fit together"),
    ],
    ids=["missing", "surplus", "short bias", "wrong width", "wrong rank"],
)
def test_a_folded_file_whose_tensors_do_not_fit_is_refused(damage, message: str, tmp_path: Path) -> None:
    path = tmp_path / "folded.safetensors"
    tinysr_kernels.compile("demo", device="cpu").save(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata | {"tensors": manifest(tensors)})  # a list that fits: the network must notice
    with pytest.raises(tinysr_kernels.CheckpointError, match=message):
        tinysr_kernels.compile(path, device="cpu")


def test_weights_that_do_not_fit_on_the_device_are_no_broken_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("tinysr_kernels.runtime.compiled.place", full)
    with pytest.raises(tinysr_kernels.OutOfMemory, match="weights do not fit on cpu"):
        tinysr_kernels.compile("demo", device="cpu")
