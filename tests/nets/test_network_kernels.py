"""Whole models on their kernels, against the reference networks; every operator under torch's own checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tinysr_kernels
from tests.layouts.adcsr import write_adcsr
from tests.layouts.osediff import write_osediff
from tests.layouts.tinysr import write_tinysr
from tests.layouts.tsd_sr import write_tsd_sr
from tests.layouts.unet import write_unet
from tests.layouts.weights import random_image
from tests.ops.cases import CASES
from tests.ops.contract import opcheck
from tests.ops.kernel_contract import DEVICE, to_device
from tinysr_kernels.families import TinySRConfig, UNetConfig, osediff, tsd_sr
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import Gpu, assume
from tinysr_kernels.nets.diffusion import sd3
from tinysr_kernels.ops import REGISTRY

pytestmark = pytest.mark.numeric

# What a compiled network in float32 is held to on its references as well (tests/nets/test_networks.py).
BOUND = 1e-5
# Few programs, each of much work, are what the interpreter runs fastest.
SMALL = Gpu("a GPU of one multiprocessor", (9, 0), 1)

TINYSR = TinySRConfig(head_dim=16, encoder_blocks=(1, 1), decoder_blocks=(1, 1), scaling_factor=0.7)
VAE_INPUT = UNetConfig(input="vae", prediction="subtract", head_dim=6, encoder_blocks=(1, 1), decoder_blocks=(1, 1))


def tinysr(path: Path, **options: Any) -> Any:
    """One block of 48 channels on 8x8 tokens, which an image of 8x8 fills."""
    return write_tinysr(path, dim=48, layers=1, pooled_dim=24, channels=4, vae_width=10, config=TINYSR, **options)


NETWORKS: dict[str, tuple[Callable[[Path], Any], tuple[int, int]]] = {
    "TinySR": (lambda path: tinysr(path, separable_decoder=True), (7, 8)),
    "TinySR, cached modulation, dense decoder": (lambda path: tinysr(path, conditioning="buffers"), (8, 8)),
    "AdcSR": (lambda path: write_adcsr(path, channels=(48, 96), decoder_channels=(8, 10, 12, 12), layers=1), (7, 8)),
    "separable UNet": (
        lambda path: write_unet(
            path / "model.safetensors",
            UNetConfig(head_dim=6, residual="bicubic", color_fix="wavelet", decoder_blocks=(1, 1, 1, 1)),
            channels=(12, 30),
            transformers=(True, False),
            decoder="tiny",
            vae_width=10,
            latent_channels=15,
        ),
        (8, 5),
    ),
    "UNet between the halves of a VAE": (
        lambda path: write_unet(
            path,
            VAE_INPUT,
            channels=(12, 18),
            decoder="tiny",
            vae_width=10,
            latent_channels=6,
            transformers=(False, True),
            time="bias",
        ),
        (3, 4),
    ),
}


LONG = {"AdcSR", "TinySR, cached modulation, dense decoder", "UNet between the halves of a VAE"}
"""Left to `make long`: their kernels run in the others, or alone."""


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long if n in LONG else ()) for n in NETWORKS])
def test_network_equals_its_reference(name: str, tmp_path: Path) -> None:
    """Every family, image to image, and every operator that has kernels ran on them."""
    write, size = NETWORKS[name]
    layout = write(tmp_path)
    path = getattr(layout, "folder", None) or layout.path
    image = random_image(*size, dtype=torch.float64)
    exact = layout.upscale(image)
    with assume(SMALL):
        model = tinysr_kernels.compile(path, device=DEVICE, dtype="float32", backend="triton")
        found = model(image[0].float().to(DEVICE)).cpu().double()
    assert float((found - exact[0]).norm() / exact.norm()) < BOUND
    run = {call.op for call in model.launches if call.source != "reference"}
    assert run == {call.op for call in model.launches if call.op in REGISTRY}


@pytest.mark.long
def test_osediff_equals_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a latent of odd sides, with windows that it does not need."""
    monkeypatch.setattr(osediff.OSEDiff, "least", 2)
    layout = write_osediff(tmp_path, channels=(8, 16), heads=(2, 1), vae_channels=(4, 8, 8, 8), groups=4)
    layout.config = replace(layout.config, least=2)
    image = random_image(6, 10, dtype=torch.float64)
    exact = layout.upscale(image)
    with assume(SMALL):
        model = tinysr_kernels.compile(layout.folder, device=DEVICE, dtype="float32", backend="triton")
        found = model(image[0].float().to(DEVICE)).cpu().double()
    assert float((found - exact[0]).norm() / exact.norm()) < BOUND
    run = {call.op for call in model.launches if call.source != "reference"}
    assert run == {call.op for call in model.launches if call.op in REGISTRY}
    assert "cross_attention" in run


@pytest.mark.long
def test_tsd_sr_equals_its_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two windows, which the text's constants serve alike."""
    monkeypatch.setattr(tsd_sr, "WINDOW", 8)
    monkeypatch.setattr(sd3, "WINDOW_BATCH", 256)  # for what compile() traces
    layout = write_tsd_sr(tmp_path)
    layout.config = replace(layout.config, overlap=4)
    image = random_image(16, 18, dtype=torch.float64)
    exact = layout.upscale(image)
    with assume(SMALL):
        model = tinysr_kernels.compile(layout.folder, device=DEVICE, dtype="float32", backend="triton")
        found = model(image[0].float().to(DEVICE)).cpu().double()
    assert float((found - exact[0]).norm() / exact.norm()) < BOUND
    run = {call.op for call in model.launches if call.source != "reference"}
    assert run == {call.op for call in model.launches if call.op in REGISTRY}
    assert "joint_attention" in run


@pytest.mark.long
def test_programmatic_dependent_launch_changes_no_bit(tmp_path: Path) -> None:
    """On a GPU of capability 9.0 launches do begin early; the interpreter takes the option and goes on in order."""
    path = NETWORKS["TinySR"][0](tmp_path).folder
    image = random_image(7, 8)[0].float().to(DEVICE)
    found = []
    for on in (False, True):
        with assume(SMALL), configs.given_pdl(on):
            model = tinysr_kernels.compile(path, device=DEVICE, dtype="float32", backend="triton")
            found += [model(image) for _ in range(3 if DEVICE.type == "cuda" else 1)]
    assert all(torch.equal(one, found[0]) for one in found)


@pytest.mark.long
def test_demo_is_the_same_picture() -> None:
    """To within one step of 256, and where the configurations came from is told."""
    image = torch.rand(3, 5, 7)
    reference = tinysr_kernels.compile("demo", device=DEVICE, dtype="float32", backend="reference")
    with assume(SMALL):
        kernels = tinysr_kernels.compile("demo", device=DEVICE, dtype="float32", backend="triton")
        difference = (kernels(image) - reference(image)).abs().max().item()
    assert difference < 1 / 255
    sources = kernels.info()["launch_configurations"]
    assert sources.get("heuristic", 0) > 0
    assert sum(sources.values()) == kernels.info()["launches_per_image"]
    assert set(reference.info()["launch_configurations"]) == {"reference"}


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_opcheck_on_kernels(op: str) -> None:
    """Schema, fake tensors, tracing with static and dynamic shapes, as torch.library checks them, on the kernels."""
    arguments = {name: to_device(value) for name, value in CASES[op][0].arguments(torch.float32).items()}
    with using("triton"):
        opcheck(op, arguments)
