"""PiSA-SR, HYPIR and OMGSR-S through compile() against the reference pipeline, and every trap undone.

The smallest side of an image and the UNet's windows are shrunk, so that small images show what large ones do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.checkpoint.edit import edit, edit_json, refused
from tests.layouts.osediff import EMBEDDING, UNET, VAE
from tests.layouts.osediff_kin import (
    FILE,
    HYPIR_FILE,
    NAMES,
    PISA_FILE,
    UNET_ADAPTER,
    VAE_ADAPTER,
    Relative,
    write_relative,
)
from tests.layouts.weights import random_image, write_pickle
from tinysr_kernels.checkpoint.sd import scheduler
from tinysr_kernels.errors import CheckpointError, InputError
from tinysr_kernels.families import FAMILIES, load, osediff_kin
from tinysr_kernels.nets import windows
from tinysr_kernels.nets.diffusion import sd

pytestmark = pytest.mark.numeric
LONG = pytest.mark.long
WHOLE, WINDOWS = (16, 18), (40, 26)
"""Low-resolution sizes, with latents of 8x9 and 20x13 in windows of 10."""
DEFAULT = {"pisa-sr": "adain", "hypir": "wavelet", "omgsr-s": "adain"}


class Small:
    """Of a configuration: what the reference needs, shrunk."""

    scaling_factor = 0.18215
    window, overlap, least = 10, 4, 8


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Relative]:
    return {name: write_relative(tmp_path_factory.mktemp(name), name) for name in NAMES}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        for field in ("window", "overlap", "least"):
            monkeypatch.setattr(type(FAMILIES[name]), field, getattr(Small, field))


def error(layout: Relative, size: tuple[int, int], color_fix: Any = "none", **options: Any) -> float:
    """The relative error of a model that is compiled for it against the reference pipeline in float64."""
    return error_of(tinysr_kernels.compile(layout.folder, color_fix=color_fix, **options), layout, size)


def error_of(model: Any, layout: Relative, size: tuple[int, int]) -> float:
    """The same of a model at hand."""
    expected = layout.upscale(random_image(*size, dtype=torch.float64), Small(), model.color_fix)[0]
    found = model(random_image(*size, dtype=torch.float64)[0])
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NAMES)
def test_image_to_image(layouts: dict[str, Relative], name: str) -> None:
    model = tinysr_kernels.compile(layouts[name].folder)
    assert (model.family, model.color_fix, model.config.window) == (name, DEFAULT[name], 10)
    for size in (WHOLE, WINDOWS):
        assert error_of(model, layouts[name], size) < 1e-5
    assert any("LoRA" in line for line in model.info()["folded"])


@LONG
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("color_fix", ["none", "adain", "wavelet"])
def test_color_fixes(layouts: dict[str, Relative], name: str, color_fix: str) -> None:
    assert error(layouts[name], WHOLE, color_fix) < 1e-5


def test_sizes_of_the_releases() -> None:
    """Windows, time steps and x0 = (z - n p) / m as published."""
    expected = {"pisa-sr": (96, 1, 1.0, 1.0), "hypir": (64, 200, 1.152, 0.572), "omgsr-s": (64, 273, 1.254, 0.757)}
    for name, (window, timestep, of_z, of_p) in expected.items():
        family = FAMILIES[name]
        config = family.config_class()
        assert (config.window, config.overlap, config.least) == (window, 32, 64)
        assert family.timestep == timestep
        assert 1 / config.signal == pytest.approx(of_z, abs=5e-4)
        assert config.noise / config.signal == pytest.approx(of_p, abs=5e-4)


# Weights of PiSA-SR's adapters


def test_weights_of_the_adapters(tmp_path: Path) -> None:
    weights = (0.5, 1.5)
    layout = write_relative(tmp_path, "pisa-sr", weights=weights)
    model = tinysr_kernels.compile(tmp_path, color_fix="none", lora_weights=list(weights))
    assert error_of(model, layout, WHOLE) < 1e-5
    assert error(layout, WHOLE, lora_weights=weights[::-1]) > 1e-4
    assert any("pixel 0.5, semantic 1.5" in line for line in model.info()["folded"])
    assert model._settings()[0]["lora_weights"] == weights  # a spawned worker loads the same


@pytest.mark.parametrize("weights", [(), 1.0, "11", (1, "a"), (1, float("nan")), (1e9, 1), (True, 1), [1] * 99])
def test_what_are_no_weights(weights: Any) -> None:
    with pytest.raises(InputError, match="lora_weights must be"):
        tinysr_kernels.compile("demo", lora_weights=weights)


@pytest.mark.parametrize("alpha", [0, -1, float("inf"), float("nan"), "8", True, [8]])
def test_what_is_no_alpha(alpha: Any) -> None:
    with pytest.raises(InputError, match="lora_alpha must be"):
        tinysr_kernels.compile("demo", lora_alpha=alpha)


def test_lora_arguments_for_those_who_have_them(layouts: dict[str, Relative], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lora_alpha is for .*hypir.*; this checkpoint is tinysr-unet"):
        tinysr_kernels.compile("demo", lora_alpha=8)
    with pytest.raises(CheckpointError, match=r"lora_weights are for .*pisa-sr \(pixel, semantic\).*is hypir"):
        load(layouts["hypir"].folder, lora_weights=(1.0, 1.0))
    with pytest.raises(CheckpointError, match="found 3 weights"):
        load(layouts["pisa-sr"].folder, lora_weights=(1.0, 1.0, 1.0))
    tinysr_kernels.compile(layouts["pisa-sr"].folder).save(tmp_path / "folded.safetensors")
    for options in ({"lora_weights": (1, 1)}, {"lora_alpha": 8}):
        with pytest.raises(CheckpointError, match="folded with its LoRA already"):
            tinysr_kernels.compile(tmp_path / "folded.safetensors", **options)


# Alpha


def test_alpha_that_nobody_states(tmp_path: Path) -> None:
    """OMGSR-S states it beside each adapter, and where that is gone the user is asked."""
    layout = write_relative(tmp_path, "omgsr-s")
    for adapter in (UNET_ADAPTER, VAE_ADAPTER):
        config = tmp_path / adapter / "adapter_config.json"
        kept = config.read_text()
        config.unlink()
        refused(tmp_path, adapter, "adapter_config.json", "lora_alpha=")
        config.write_text(json.dumps({"r": 3}))
        refused(tmp_path, adapter, "lora_alpha=")
        config.write_text(kept)
    wanted = layout.base.unet.conv_in.weight
    torch.testing.assert_close(load(tmp_path).tensors["unet.conv_in.weight"], wanted, rtol=1e-5, atol=1e-6)
    given = load(tmp_path, lora_alpha=3.0).tensors["unet.conv_in.weight"]  # 6 is stated
    assert not torch.allclose(given, wanted, rtol=1e-2)
    edit_json(tmp_path / UNET_ADAPTER / "adapter_config.json", lora_alpha=3.0)
    assert torch.equal(load(tmp_path).tensors["unet.conv_in.weight"], given)


# What does not fit


def test_a_file_alone_and_a_base_alone(layouts: dict[str, Relative], tmp_path: Path) -> None:
    refused(layouts["hypir"].folder / HYPIR_FILE, "HYPIR's LoRA", "only one part", '{"hypir": ..., "unet": ...')
    refused(layouts["pisa-sr"].folder / PISA_FILE, "PiSA-SR's LoRA", '{"pisa_sr": ..., "unet": ..., "vae": ...')
    for adapter, name in ((UNET_ADAPTER, "of the UNet"), (VAE_ADAPTER, "of the VAE's encoder")):
        refused(layouts["omgsr-s"].folder / adapter / FILE, name, "only one part", '"unet_lora": ..., "vae_lora": ...')
    write_relative(tmp_path, "omgsr-s")
    (tmp_path / VAE_ADAPTER / FILE).unlink()
    refused(tmp_path, "a LoRA of omgsr-s, without OMGSR-S's LoRA of the VAE's encoder", '"vae_lora": ...')
    write_relative(tmp_path, "omgsr-s")
    (tmp_path / UNET_ADAPTER / FILE).unlink()
    refused(tmp_path, "make a checkpoint of omgsr-s together with OMGSR-S's LoRA of the UNet")


def test_two_relatives_in_one_folder(tmp_path: Path) -> None:
    write_relative(tmp_path, "hypir")
    write_relative(tmp_path, "pisa-sr")
    refused(tmp_path, "found several checkpoints", HYPIR_FILE, "pisa_sr.pkl")
    base = {"unet": tmp_path / UNET, "vae": tmp_path / VAE, "embeddings": tmp_path / EMBEDDING}
    assert load({"hypir": tmp_path / HYPIR_FILE, **base}).family == "hypir"
    assert load({"pisa_sr": tmp_path / PISA_FILE, **base}).family == "pisa-sr"
    refused({"hypir": tmp_path / PISA_FILE, **base}, "expected HYPIR's LoRA", "found PiSA-SR's LoRA")
    refused({"osediff": tmp_path / PISA_FILE, **base}, "expected OSEDiff's LoRA", "found PiSA-SR's LoRA")


def test_a_lora_that_does_not_fit(tmp_path: Path) -> None:
    write_relative(tmp_path, "pisa-sr")
    content = torch.load(tmp_path / PISA_FILE, weights_only=True)
    lora = dict(content["state_dict_unet"])

    def written(change: Callable[[dict[str, Tensor]], Any]) -> None:
        changed = dict(lora)
        change(changed)
        write_pickle(tmp_path / PISA_FILE, content | {"state_dict_unet": changed})

    key = "conv_in.lora_A.default_encoder_sem.weight"
    written(lambda d: d.pop(key))
    refused(tmp_path, "conv_in", "no lora_A")
    written(lambda d: d.update({"conv_in.lora_A.other.weight": torch.ones(2, 4, 3, 3)}))
    refused(tmp_path, "conv_in.lora_A.other", "unexpected")
    written(lambda d: [d.pop(name) for name in lora if name.endswith("_sem.weight")])
    refused(tmp_path, "default_*_sem", "found none")
    written(lambda d: d.update({key: torch.ones(2, 5, 3, 3)}))
    refused(tmp_path, "conv_in", "[2, 5, 3, 3]")


def test_every_key_of_the_others_is_consumed(tmp_path: Path) -> None:
    more = {f"nothing.lora_{side}.default.weight": torch.ones(4, 4) for side in "AB"}
    layout = write_relative(tmp_path / "hypir", "hypir")
    write_pickle(layout.folder / HYPIR_FILE, torch.load(layout.folder / HYPIR_FILE, weights_only=True) | more)
    refused(layout.folder, "there is no module", "nothing")
    layout = write_relative(tmp_path / "omgsr", "omgsr-s")
    path = layout.folder / VAE_ADAPTER / FILE
    edit(
        path,
        lambda tensors: tensors.update(
            {k.replace(".default", "").replace("n", "base_model.model.n", 1): t for k, t in more.items()}
        ),
    )
    refused(layout.folder, "there is no module", "encoder.nothing")


# Traps


def _set(name: str, field: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(type(FAMILIES[name]), field, value)


def _config(name: str, field: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(FAMILIES[name].config_class, field, value)


def _one_adapter(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(osediff_kin, "summed", lambda parts, weights: parts[0])


def _of_the_decoder(patch: pytest.MonkeyPatch) -> None:
    given = osediff_kin.OMGSR.adaptation
    patch.setattr(osediff_kin.OMGSR, "adaptation", lambda self, found: replace(given(self, found), vae={}))


TRAPS: Mapping[str, tuple[str, Callable[[pytest.MonkeyPatch], None], tuple[int, int]]] = {
    "PiSA-SR at OSEDiff's time step": ("pisa-sr", _set("pisa-sr", "timestep", 999), WHOLE),
    "PiSA-SR at scale 1": ("pisa-sr", _set("pisa-sr", "lora_alpha", 3), WHOLE),
    "PiSA-SR without its semantics": ("pisa-sr", _one_adapter, WHOLE),
    "PiSA-SR's prediction taken for noise": ("pisa-sr", _config("pisa-sr", "noise", 0.9), WHOLE),
    "PiSA-SR with windows off their middle": ("pisa-sr", _config("pisa-sr", "symmetric", False), WINDOWS),
    "HYPIR at OSEDiff's scale": ("hypir", lambda m: m.setattr(osediff_kin, "read_updates", _scaled), WHOLE),
    "HYPIR at another time step": ("hypir", _set("hypir", "timestep", 199), WHOLE),
    "HYPIR enlarged as Pillow does": ("hypir", _config("hypir", "pillow", True), WHOLE),
    "OMGSR-S without its VAE's LoRA": ("omgsr-s", _of_the_decoder, WHOLE),
    "OMGSR-S at another time step": ("omgsr-s", _set("omgsr-s", "timestep", 195), WHOLE),
    "OMGSR-S with windows on their middle": ("omgsr-s", _config("omgsr-s", "symmetric", True), WINDOWS),
}


def _scaled(file: Any, alpha: Any) -> Any:
    from tinysr_kernels.checkpoint.lora import read_updates

    return read_updates(file, 8)


OFTEN = ("PiSA-SR with windows off their middle", "HYPIR enlarged as Pillow does")
"""Checked in every run; the others by `make long`."""


@pytest.mark.parametrize("trap", [pytest.param(name, marks=() if name in OFTEN else LONG) for name in TRAPS])
def test_every_trap_shows(layouts: dict[str, Relative], trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, undo, size = TRAPS[trap]
    undo(monkeypatch)
    assert error(layouts[name], size) > 5e-5


# Info and convert


@LONG
@pytest.mark.parametrize("name", NAMES)
def test_info_and_a_folded_file(layouts: dict[str, Relative], name: str, tmp_path: Path) -> None:
    facts = tinysr_kernels.describe(layouts[name].folder)
    assert (facts["family"], facts["color_fix"]) == (name, DEFAULT[name])
    assert any("LoRA" in line for line in facts["folded"])
    model = tinysr_kernels.compile(layouts[name].folder)
    model.save(tmp_path / "folded.safetensors")
    again = tinysr_kernels.compile(tmp_path / "folded.safetensors")
    image = random_image(*WHOLE)[0]
    assert (again.family, again.config) == (name, model.config)
    assert torch.equal(again(image), model(image))


def test_the_schedule_of_another_base(tmp_path: Path) -> None:
    """alpha follows the base model's noise schedule at the family's own time step."""
    layout = write_relative(tmp_path, "hypir")
    edit_json(tmp_path / "sd/scheduler/scheduler_config.json", beta_end=0.02)
    found = load(layout.folder).config
    assert found.alpha == scheduler.alpha_of(200, 0.00085, 0.02)
    assert math.isclose(found.signal**2 + found.noise**2, 1.0)


def test_weights_of_windows_are_kept_apart() -> None:
    """One table for each kind of window."""
    device = torch.device("cpu")
    plain, symmetric = (windows.window_weights(8, device, one) for one in (False, True))
    assert torch.equal(symmetric, symmetric.flip(0))
    assert torch.equal(symmetric, symmetric.T)
    assert not torch.equal(plain, symmetric)
    assert sd.window_weights is windows.window_weights
