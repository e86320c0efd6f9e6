"""All families through the launch path of a GPU, on a stand-in for Triton's driver (`driver.py`)."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from tests.standin import child
from tests.standin.sizes import FAMILIES, ORDINARY, SMALL
from tinysr_kernels.launch.plan import Launch


@pytest.fixture(scope="module")
def bound() -> Any:
    """All sizes, up to Triton's binder."""
    return child.run("tests.standin", "--json", "--stop", "signature")


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_every_size_is_launched(bound: Any, family: str) -> None:
    """Grids exist, and Triton's binder specializes as `benchmarks static` predicts."""
    seen = bound[family]
    assert seen["faults"] == []
    assert seen["images"] == len(SMALL + ORDINARY)
    assert seen["launches"] > 20 * seen["images"]
    assert seen["compiled"] >= 20


@pytest.mark.long
@pytest.mark.parametrize("arch", ["80", "120"])
def test_small_sizes_are_compiled(arch: str) -> None:
    """By Triton's front end, which meets integers of one as constants, on the oldest and on the newest architecture."""
    seen = child.run("tests.standin", "--json", "--sizes", "few", "--arch", arch)
    assert {family: seen[family]["faults"] for family, _ in FAMILIES} == {family: [] for family, _ in FAMILIES}


@pytest.mark.parametrize(("current", "entered"), [(1, []), (0, [torch.device("cuda", 1)])])
def test_a_launch_on_another_gpu_than_the_current_one(
    current: int, entered: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device, so that of the tensors is made current, unless it is."""
    made: list[torch.device] = []
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or contextlib.nullcontext())
    kernel = SimpleNamespace(made={(1,): lambda **arguments: launched.append(arguments)})
    with FakeTensorMode():
        x = torch.empty(2, device="cuda:1")
    launch = Launch(kernel, (1,), {"eps": 1.0, "x": x}, 4, 2)  # type: ignore[arg-type]
    launch.run(pdl=True)
    assert made == entered
    assert launch.options(pdl=True).items() >= {"num_warps": 4, "num_stages": 2, "launch_pdl": True}.items()
    assert launched == [{"eps": 1.0, "x": x, **launch.options(pdl=True)}]
