"""Accelerated autoencoders on their kernels, in Triton's interpreter or on a GPU; and what is prepared on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import tinysr_kernels
from tests.ops.kernel_contract import DEVICE
from tests.runtime.autoencoder.modules import autoencoder, both, image_for, latent_for, relative
from tinysr_kernels.launch.device import GPUS, Gpu, assume
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.runtime.autoencoder import network
from tinysr_kernels.runtime.autoencoder.network import Made, Settings, planned
from tinysr_kernels.runtime.autoencoder.structure import read

pytestmark = pytest.mark.numeric
SMALL = Gpu("a GPU of one multiprocessor", (9, 0), 1)
"""Few programs, each of much work, are what the interpreter runs fastest."""


@pytest.mark.parametrize(
    ("name", "quality"),
    [
        ("one level, gray", "high"),
        ("tiny, 16 channels", "high"),
        pytest.param("sd", "high", marks=pytest.mark.long),
        pytest.param("sd3", "exact", marks=pytest.mark.long),
        pytest.param("no attention", "high", marks=pytest.mark.long),
        pytest.param("tiny", "exact", marks=pytest.mark.long),
    ],
)
def test_kernels(name: str, quality: str) -> None:
    module = autoencoder(name, **({} if name.startswith("tiny") else {"layers_per_block": 1})).to(DEVICE)
    image, latent = image_for(module, 8, 4, 1).to(DEVICE), latent_for(module, 4, 3, 1).to(DEVICE)
    wanted = both(copy.deepcopy(module).double(), image.double(), latent.double())
    with assume(SMALL):
        found = both(tinysr_kernels.accelerate(module, quality=quality, backend="triton"), image, latent)
    for one, exact in zip(found, wanted, strict=True):
        assert relative(one, exact) < 1e-5


def half(name: str, which: str, dtype: torch.dtype) -> Any:
    return getattr(autoencoder(name).to(dtype), which)


@pytest.mark.parametrize("which", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["sd3", "tiny"])
@pytest.mark.parametrize("quality", ["exact", "high"])
def test_every_operator_is_planned_with_kernels(name: str, which: str, quality: str) -> None:
    """What is compiled and checked when a network is made on a GPU, for the layouts of its real inputs."""
    structure, tensors = read(half(name, which, torch.float16))
    made = Made(structure, tensors, Settings(quality, "reference"), torch.float16)
    channels = tensors[structure.first_weight].shape[1]
    meta = copy.deepcopy(made.network).to("meta")
    with assume(GPUS[90]):
        operators = planned(meta, channels, torch.float16, torch.device("cpu"))
        assert operators
        for one in operators:
            assert REGISTRY[one.name] is type(one)
            plan, _ = one.planned()
            assert plan.launches


def test_a_network_on_a_gpu_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are compiled ahead and held to the references, as `compile` does."""
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(network, "compile_ahead", lambda calls, _: done.append(("compiled", len(list(calls)))))
    monkeypatch.setattr(network.self_check, "at_compile", lambda calls, _: done.append(("checked", len(list(calls)))))
    structure, tensors = read(half("sd", "decoder", torch.float32))
    made = Made(structure, tensors, Settings("high", "reference"), torch.float32)
    folded = {name: t.detach() for name, t in network._fold(structure, tensors, torch.float32, False).items()}
    made._prepare(folded, torch.device("cpu"), False)
    assert [kind for kind, _ in done] == ["compiled", "checked"]
    assert done[0][1] == done[1][1] > 20
