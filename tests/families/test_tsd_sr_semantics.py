"""TSD-SR through compile() against the reference pipeline, and every trap of its layout and mathematics undone.

The transformer's windows are shrunk, so that small images show what large ones do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.layouts.error import relative_error
from tests.layouts.tsd_sr import SCALE, SHIFT, TSDSRLayout, write_tsd_sr
from tests.layouts.weights import random_image
from tinysr_kernels.checkpoint import modulation
from tinysr_kernels.checkpoint.lora import Update, read_updates
from tinysr_kernels.checkpoint.sd3 import prompt, transformer
from tinysr_kernels.families import FAMILIES, tsd_sr
from tinysr_kernels.nets import layers
from tinysr_kernels.nets.diffusion import sd3
from tinysr_kernels.nets.networks import resize

pytestmark = pytest.mark.numeric
LONG = pytest.mark.long
WHOLE, ODD, WINDOWS = (16, 16), (18, 22), (20, 36)
"""Low-resolution sizes, with latents of 8x8, one window, of 9x11, and of 10x18."""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> TSDSRLayout:
    made = write_tsd_sr(tmp_path_factory.mktemp("tsd-sr"))
    made.config = replace(made.config, overlap=4)
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WINDOW", 8), ("OVERLAP", 4)):
        monkeypatch.setattr(tsd_sr, name, value)
    # What compile() traces for its report, an image of 128x128, has hundreds of such windows.
    monkeypatch.setattr(sd3, "WINDOW_BATCH", 256)


def picture(height: int, width: int, count: int = 1) -> Tensor:
    """So much contrast that its enlargement leaves [0,1]."""
    return (random_image(height, width, count=count, dtype=torch.float64) * 2 - 0.5).clamp(0, 1)


error = functools.partial(relative_error, picture=picture)


@pytest.mark.parametrize("size", [ODD, WINDOWS, *(pytest.param(s, marks=LONG) for s in (WHOLE, (9, 7)))], ids=str)
def test_image_to_image(layout: TSDSRLayout, size: tuple[int, int]) -> None:
    assert error(layout, size, "wavelet") < 1e-5


@pytest.mark.parametrize("color_fix", [pytest.param("none", marks=LONG), "adain"])
def test_color_fixes(layout: TSDSRLayout, color_fix: str) -> None:
    assert error(layout, ODD, color_fix) < 1e-5


@pytest.mark.parametrize("factor", [1, pytest.param(3, marks=LONG)])
def test_any_factor(layout: TSDSRLayout, factor: int) -> None:
    assert error(layout, (66 // factor, 80 // factor + 1), "wavelet", factor) < 1e-5


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=LONG)])
def test_few_blocks(tmp_path: Path, layers: int) -> None:
    """A block may be the first and the last at once: constant keys, and no queries of the text."""
    made = write_tsd_sr(tmp_path, layers=layers, heads=3, head_dim=12, seed=5)
    made.config = replace(made.config, overlap=4)
    assert error(made, WHOLE) < 1e-5


@LONG
def test_batches_bytes_and_tiles(layout: TSDSRLayout) -> None:
    model = tinysr_kernels.compile(layout.folder)
    assert model.color_fix == "wavelet"
    images = (picture(*WINDOWS, count=2) * 255).to(torch.uint8)
    together = model(images)
    for image, found in zip(images, together, strict=True):
        assert float((model(image).int() - found.int()).abs().max()) <= 1
        wanted = layout.upscale(image[None].double() / 255)[0] * 255
        assert float((found - wanted).abs().max()) < 0.51
    tiled = tinysr_kernels.compile(layout.folder, tile=24)(images[0])
    assert tiled.shape == together[0].shape


def test_small_gates_are_kept_apart(tmp_path: Path) -> None:
    """In half precision a weight times a gate of 1e-5 would be subnormal."""
    made = write_tsd_sr(tmp_path)
    found = FAMILIES["tsd-sr"]
    checkpoint = tinysr_kernels.families.load(tmp_path)
    name = "transformer.transformer_blocks.1.context_modulation"
    tensors = dict(checkpoint.tensors)
    tensors[name] = tensors[name] * torch.tensor([1.0, 1.0, 1e-6, 1.0, 1.0, 1e-6])[:, None]
    folded = found.fold(checkpoint.config, tensors, torch.float16)
    assert {k for k in folded if k.endswith(".gate")} == {f"transformer.blocks.1.text.{k}.gate" for k in ("out", "ff2")}
    assert any("2 gates kept apart" in phrase for phrase in found.folds(folded))
    assert made.window == 8


# Traps


def _updates_at(scale: float, only: str) -> Callable[[pytest.MonkeyPatch], None]:
    """A LoRA at another scale: that of the transformer, or that of the VAE's encoder."""

    def read(file: Any) -> dict[str, Update]:
        updates = read_updates(file)
        mine = any(name.startswith(only) for name in updates)
        return {k: replace(u, scale=scale) for k, u in updates.items()} if mine else updates

    return lambda monkeypatch: monkeypatch.setattr(tsd_sr, "read_updates", read)


def _rows_swapped(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """(shift, scale) where (scale, shift) is stored."""
    given = tsd_sr._Normalized.__getitem__

    def swapped(self: Any, key: str) -> Tensor:
        return given(self, key).flip(0) if key == f"transformer.{name}" else given(self, key)

    return lambda monkeypatch: monkeypatch.setattr(tsd_sr._Normalized, "__getitem__", swapped)


def _corner(weights: Any, size: transformer.Size, window: int, notices: list[str]) -> Tensor:
    stored = weights.take(transformer.TABLE, [1, None, None])
    side = window // size.patch
    return stored.unflatten(1, (size.side, -1))[:, :side, :side].flatten(1, 2)


def _of_null(named: Any, beside: Any, *rest: Any) -> Any:
    return given_embeddings(named, [file for file in beside if file.path.parent.name == "null"], *rest)


given_embeddings = prompt.embeddings


def _later(tensors: Any, pooled: Tensor) -> Tensor:
    features, modulation.timestep_features = modulation.timestep_features, lambda n: features(n, 999.0)
    try:
        return given_embed(tensors, pooled)
    finally:
        modulation.timestep_features = features


given_embed = modulation.embed


def _heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tsd_sr, "TSDSRConfig", lambda width, *rest: replace(made(width, *rest), head_dim=width * 2))


made = tsd_sr.TSDSRConfig


TRAPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "the transformer's LoRA at another scale": _updates_at(8 / 3, "transformer_blocks"),
    "the VAE's LoRA at another scale": _updates_at(4.0, "encoder"),
    "the transformer's LoRA left out": _updates_at(0.0, "transformer_blocks"),
    "the VAE's LoRA left out": _updates_at(0.0, "encoder"),
    "the text's last norm, shift first": _rows_swapped("transformer_blocks.2.context_modulation"),
    "the last norm, shift first": _rows_swapped("norm_out.modulation"),
    "the table's corner": lambda m: m.setattr(transformer, "table", _corner),
    "another prompt": lambda m: m.setattr(prompt, "embeddings", _of_null),
    "another time step": lambda m: m.setattr(modulation, "embed", _later),
    "wider heads": _heads,
    "no clamp before the encoder": lambda m: m.setattr(sd3, "resize", lambda *a, clamp: resize(*a)),
    "Pillow's bicubic": lambda m: m.setattr(sd3, "resize", lambda *a, clamp: resize(*a, pillow=True)),
}
LESS_LIKELY = ("the transformer's LoRA left out", "the VAE's LoRA left out", "another overlap", "the text as it began")


def each(traps: Mapping[str, Any]) -> list[Any]:
    """The names, those of unlikely mistakes for `make long`."""
    return [pytest.param(name, marks=LONG if name in LESS_LIKELY else ()) for name in traps]


@pytest.mark.parametrize("trap", each(TRAPS))
def test_every_trap_shows(layout: TSDSRLayout, trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    TRAPS[trap](monkeypatch)
    assert error(layout, WHOLE) > 1e-4


def _shifted(model: Any) -> None:
    """z = k (mean - shift_factor), as diffusers' pipelines have it."""
    model.network.encoder.conv_out.bias.sub_(SHIFT * SCALE)


def _one_window(model: Any) -> None:
    """The windows' results side by side, the later one over the earlier."""
    model.network.overlap = 0


def _text_as_it_began(model: Any) -> None:
    for block in model.network.transformer.blocks:
        block.text = None


def _without_scale(model: Any) -> None:
    model.network.encoder.conv_out.wide.div_(SCALE)
    model.network.encoder.conv_out.bias.div_(SCALE)
    model.network.decoder.conv_in.weight.mul_(SCALE)


def _both_sides(model: Any) -> None:
    for block in model.network.encoder.down_blocks:
        for layer in block.children():
            if isinstance(layer, layers.Conv):
                layer.one_sided = False


def _adain_of_the_enlarged(model: Any) -> None:
    model._family = type("Other", (), {"adain": replace(FAMILIES["tsd-sr"].adain, enlarged=True)})


CHANGES: dict[str, tuple[Callable[[Any], None], tuple[int, int], str]] = {
    "the shift factor applied": (_shifted, WHOLE, "none"),
    "no scale of the latent": (_without_scale, WHOLE, "none"),
    "the text as it began": (_text_as_it_began, WHOLE, "none"),
    "no overlap": (_one_window, WINDOWS, "none"),
    "another overlap": (lambda model: setattr(model.network, "overlap", 3), WINDOWS, "none"),
    "padding on both sides": (_both_sides, WHOLE, "none"),
    "AdaIN against the enlarged image": (_adain_of_the_enlarged, WHOLE, "adain"),
}


@pytest.mark.parametrize("trap", each(CHANGES))
def test_every_change_of_the_network_shows(layout: TSDSRLayout, trap: str) -> None:
    change, size, color_fix = CHANGES[trap]
    assert error(layout, size, color_fix, change=change) > 1e-4


def test_latents_stay_wide(layout: TSDSRLayout) -> None:
    """In half precision the latent is float32 before and after the transformer."""
    model = tinysr_kernels.compile(layout.folder, dtype="bfloat16")
    seen: dict[str, Tensor] = {}
    network = model.network
    for name in ("encoder", "transformer"):
        getattr(network, name).register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: out}))
    network.decoder.register_forward_pre_hook(lambda _, inputs: seen.update(decoder=inputs[0]))
    model(picture(*WINDOWS)[0])
    assert set(seen) == {"encoder", "transformer", "decoder"}
    for name, latent in seen.items():
        assert latent.dtype == torch.float32, name
        assert (latent != latent.bfloat16()).double().mean() > 0.9, name
    assert error(layout, WHOLE, dtype="bfloat16") < 0.05
