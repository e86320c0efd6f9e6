"""OSEDiff through compile() against the reference pipeline, and every trap of its layout and mathematics undone.

The smallest side of an image and the UNet's windows are shrunk, so that small images show what large ones do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.layouts.error import relative_error
from tests.layouts.osediff import OSEDiffLayout, write_osediff
from tests.layouts.weights import random_image
from tinysr_kernels.checkpoint import lora
from tinysr_kernels.checkpoint.sd import kl_vae, unet
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import FAMILIES, one_step_sd, osediff
from tinysr_kernels.nets import layers, windows
from tinysr_kernels.nets.diffusion import sd
from tinysr_kernels.nets.fold import channels_last
from tinysr_kernels.nets.networks import resize
from tinysr_kernels.ops.conv.upsample_conv import phase_weights
from tinysr_kernels.ops.trace import trace

pytestmark = pytest.mark.numeric
LONG = pytest.mark.long
WHOLE, ODD, WINDOWS, NARROW = (16, 20), (18, 22), (40, 26), (52, 16)
"""Low-resolution sizes, with latents of 8x10, 9x11, 20x13 in windows of 10, and 26x8 in windows of 8."""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> OSEDiffLayout:
    made = write_osediff(tmp_path_factory.mktemp("osediff"))
    made.config = replace(made.config, window=10, overlap=4, least=8)
    return made


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("window", 10), ("overlap", 4), ("least", 8)):
        monkeypatch.setattr(osediff.OSEDiff, name, value)


def picture(height: int, width: int) -> Tensor:
    return random_image(height, width, dtype=torch.float64)


error = functools.partial(relative_error, picture=picture)


@pytest.mark.parametrize(
    "size", [ODD, WINDOWS, NARROW, *(pytest.param(s, marks=LONG) for s in (WHOLE, (9, 7)))], ids=str
)
def test_image_to_image(layout: OSEDiffLayout, size: tuple[int, int]) -> None:
    assert error(layout, size, "adain") < 1e-5


@pytest.mark.parametrize("color_fix", [pytest.param("none", marks=LONG), "wavelet"])
def test_color_fixes(layout: OSEDiffLayout, color_fix: str) -> None:
    assert error(layout, ODD, color_fix) < 1e-5


@pytest.mark.parametrize("factor", [1, pytest.param(3, marks=LONG)])
def test_any_factor(layout: OSEDiffLayout, factor: int) -> None:
    """The image is enlarged before anything else; osediff_face.pkl is for a factor of one."""
    assert error(layout, (50 // factor, 80 // factor + 1), "adain", factor) < 1e-5  # 50 is padded


@LONG
def test_batches_bytes_and_tiles(layout: OSEDiffLayout) -> None:
    model = tinysr_kernels.compile(layout.folder)
    images = (random_image(*WINDOWS, count=2) * 255).to(torch.uint8)
    together = model(images)
    for image, found in zip(images, together, strict=True):
        assert torch.equal(model(image), found)
        wanted = layout.upscale(image[None].double() / 255)[0] * 255
        assert float((found - wanted).abs().max()) < 0.51
    tiled = tinysr_kernels.compile(layout.folder, tile=24)(images[0])
    assert tiled.shape == together[0].shape
    # A tile has statistics of its own: another picture, but not a very different one.
    assert 0 < float((tiled.float() - together[0]).abs().mean()) < 64


def test_weights_of_windows_are_no_launches(layout: OSEDiffLayout) -> None:
    """Whoever counts an image's work counts the same the first time and later."""
    model = tinysr_kernels.compile(layout.folder)
    meta = model._build({name: tensor.to("meta") for name, tensor in model._folded.items()})
    image = torch.empty(1, 3, *WINDOWS, device="meta")
    windows.window_weights.cache_clear()
    first, second = (len(trace(lambda: meta(image))) for _ in range(2))
    assert first == second


def _without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = one_step_sd._checked_unet
    monkeypatch.setattr(one_step_sd, "_checked_unet", lambda base, size, replaced: checked(base, size, {}))


def _replaced_after_its_update(monkeypatch: pytest.MonkeyPatch) -> None:
    given = osediff.OSEDiff.adaptation

    def after(self: Any, found: Any) -> Any:
        adaptation = given(self, found)
        return replace(adaptation, unet={k: v for k, v in adaptation.unet.items() if k != "conv_in"})

    monkeypatch.setattr(osediff.OSEDiff, "adaptation", after)


def _heads_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    given = unet.attention_heads
    monkeypatch.setattr(unet, "attention_heads", lambda size: [(name, 8) for name, _ in given(size)])


def _phases_cropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(self: Any, x: Tensor, height: int, width: int) -> Tensor:
        return self(x)[:, :, :height, :width]

    monkeypatch.setattr(layers.Conv, "cropped", late)


def _torch_bicubic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd, "resize", lambda image, factor, dtype, pillow: resize(image, factor, dtype).clamp(0, 1))


def _both_sides(model: Any) -> None:
    for block in model.network.encoder.down_blocks:
        for layer in block.children():
            if isinstance(layer, layers.Conv):
                layer.one_sided = False


def _adain_of_the_original(model: Any) -> None:
    model._family = type("Other", (), {"adain": replace(FAMILIES["osediff"].adain, enlarged=False)})


TRAPS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[int, int]]] = {
    "scale of the LoRA of one": (lambda m: m.setattr(osediff.OSEDiff, "lora_alpha", 3), WHOLE),
    "conv_in of the base model": (_without_replacement, WHOLE),
    "conv_in replaced after its update": (_replaced_after_its_update, WHOLE),
    "eight heads everywhere": (_heads_alike, WHOLE),
    "another time step": (lambda m: m.setattr(osediff.OSEDiff, "timestep", 998), WHOLE),
    "phases cropped after the convolution": (_phases_cropped, ODD),
    "torch's bicubic": (_torch_bicubic, WHOLE),
    "LoRA left out": (lambda m: m.setattr(lora, "merged", lambda weight, update: weight), WHOLE),
}


LESS_LIKELY = ("another time step", "LoRA left out", "another overlap", "smaller windows")


def each(traps: Mapping[str, Any]) -> list[Any]:
    """The names, those of unlikely mistakes for `make long`."""
    return [pytest.param(name, marks=LONG if name in LESS_LIKELY else ()) for name in traps]


@pytest.mark.parametrize("trap", each(TRAPS))
def test_every_trap_shows(layout: OSEDiffLayout, trap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    undo, size = TRAPS[trap]
    undo(monkeypatch)
    assert error(layout, size) > 1e-4


CHANGES: dict[str, tuple[Callable[[Any], None], tuple[int, int], str]] = {
    "padding on both sides": (_both_sides, WHOLE, "none"),
    "AdaIN against the original": (_adain_of_the_original, WHOLE, "adain"),
    "no windows": (lambda model: setattr(model.network, "window", 1000), WINDOWS, "none"),
    "smaller windows": (lambda model: setattr(model.network, "window", 9), WINDOWS, "none"),
    "another overlap": (lambda model: setattr(model.network, "overlap", 3), WINDOWS, "none"),
}


@pytest.mark.parametrize("trap", each(CHANGES))
def test_every_change_of_the_network_shows(layout: OSEDiffLayout, trap: str) -> None:
    change, size, color_fix = CHANGES[trap]
    assert error(layout, size, color_fix, change=change) > 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float16, 4e-3)], ids=str)
def test_a_kernel_is_recovered_from_its_phases(dtype: torch.dtype, tolerance: float) -> None:
    """So that it is not kept beside them for odd sides."""
    kernel = torch.randn(6, 10, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = layers.unphased(channels_last(phase_weights(kernel).to(dtype)))
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), kernel, rtol=0, atol=tolerance)


def test_no_kernel_is_there_twice(layout: OSEDiffLayout) -> None:
    model = tinysr_kernels.compile(layout.folder)
    phases = [name for name in model._folded if name.endswith(".phases")]
    assert any(name.startswith("unet.") for name in phases)
    assert not any(name.replace(".phases", ".weight") in model._folded for name in phases)


def test_old_names_of_the_attention(layout: OSEDiffLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kl_vae, "modern", lambda name: name)
    with pytest.raises(CheckpointError, match="to_q"):
        tinysr_kernels.compile(layout.folder)


def test_latents_stay_wide(layout: OSEDiffLayout) -> None:
    """In half precision the latent, the noise and x0 are float32, for 1/sqrt(a) amplifies what rounds them by 15."""
    model = tinysr_kernels.compile(layout.folder, dtype="bfloat16")
    seen: dict[str, Tensor] = {}
    network = model.network
    for name in ("encoder", "unet"):
        getattr(network, name).register_forward_hook(lambda _, inputs, out, name=name: seen.update({name: out}))
    network.decoder.register_forward_pre_hook(lambda _, inputs: seen.update(decoder=inputs[0]))
    network.decoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.update(x0=inputs[0]))
    model(random_image(*WINDOWS)[0])
    assert set(seen) == {"encoder", "unet", "decoder", "x0"}
    for name, latent in seen.items():
        assert latent.dtype == torch.float32, name
        assert (latent != latent.bfloat16()).double().mean() > 0.9, name
    assert error(layout, WHOLE, dtype="bfloat16") < 0.05
