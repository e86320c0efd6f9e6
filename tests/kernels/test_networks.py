"""Whole models on their kernels, against the same models on their references."""

from __future__ import annotations

import torch

import tinysr_kernels
from tests.kernels.kernels import DEVICE


def test_demo_is_the_same_picture() -> None:
    """To within one step of 256, and where the configurations came from is told."""
    image = torch.rand(3, 5, 7)
    kernels = tinysr_kernels.compile("demo", device=DEVICE, dtype="float32", backend="triton")
    reference = tinysr_kernels.compile("demo", device=DEVICE, dtype="float32", backend="reference")
    difference = (kernels(image) - reference(image)).abs().max().item()
    assert difference < 1 / 255
    sources = kernels.info()["launch_configurations"]
    assert sources.get("heuristic", 0) > 0
    assert sum(sources.values()) == kernels.info()["launches_per_image"]
    assert set(reference.info()["launch_configurations"]) == {"reference"}
