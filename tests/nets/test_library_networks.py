"""Whole models by PyTorch's libraries: every family against float64 and against eager PyTorch in the same dtype."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tinysr_kernels
from tests.layouts.weights import random_image
from tests.nets.test_network_kernels import BOUND, NETWORKS
from tests.nets.test_networks import relative
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.trace import Call
from tinysr_kernels.runtime import compiled

FACTOR = 2
"""Times the error of eager PyTorch in the same dtype, as for each operator (tests/ops/bounds.py)."""
ON_THE_IMAGE = {"resize_bicubic", "input_conv", "adain_fix", "wavelet_fix", "clamp_image"}
"""They convert the image itself, of three channels, by way of float32."""


def float32_copies(calls: list[Call]) -> list[tuple[str, str, tuple[int, ...]]]:
    """Operator, operation and shape of what is float32 in a 16-bit network and larger than a quarter of the result."""
    found = []
    for call in calls:
        for step in call.steps if call.op in REGISTRY.keys() - ON_THE_IMAGE else ():
            for moved in step.writes:
                elements = math.prod(moved.shape)
                if moved.bytes == 4 * elements and elements > math.prod(call.output) // 4:
                    found.append((call.op, step.kernel, moved.shape))
    return found


@pytest.mark.numeric
@pytest.mark.parametrize("name", NETWORKS)
def test_every_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32: as exact as the kernels. bfloat16: as good as eager, and in bfloat16 throughout."""
    monkeypatch.setattr(compiled, "TRACE_SIDE", 32)
    write, size = NETWORKS[name]
    layout = write(tmp_path)
    path = getattr(layout, "folder", None) or layout.path
    image = random_image(*size, dtype=torch.float64)
    exact = layout.upscale(image)

    def error(dtype: str) -> float:
        model = tinysr_kernels.compile(path, device="cpu", dtype=dtype, backend="library")
        ours = {call.op for call in model.launches if call.source == "library"}
        assert ours == {call.op for call in model.launches if call.op in REGISTRY}
        assert dtype == "float32" or float32_copies(model.launches) == []
        found: Tensor = model(image[0].float())
        return relative(found, exact[0])

    assert error("float32") < BOUND
    assert error("bfloat16") <= FACTOR * relative(layout.upscale(image.bfloat16()), exact)
