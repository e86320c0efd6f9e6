"""Mutation tests of the checks for GPUs: the code is broken in ways that only a GPU would show; each must be noticed.

What needs compiled kernels is broken in a process of its own (`sabotage.py`), the rest here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.launch.test_backend import test_host_tensors_beside_a_gpu as host_tensors_run_on_the_host
from tests.launch.test_first_use import test_images_of_one_column_or_row as grids_exist
from tests.launch.test_first_use import test_other_forms_can_be_captured as form_can_be_captured
from tests.ops.cases import CASES
from tests.ops.kernel_contract import mutated
from tests.standin import child
from tests.standin.races import judge
from tests.standin.test_races import planned
from tinysr_kernels.launch import backend
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.image import wavelet
from tinysr_kernels.ops.image.kernels import tanh_scaled
from tinysr_kernels.runtime.images.arrays import DEVICE_PIXELS

pytestmark = pytest.mark.mutation

COMPILED = {
    "integer_of_one": "no attribute 'to'",
    "no_wait": "before it waits",
    "no_barrier": "no barrier",
    "guarded_out_of_memory": "was swallowed",
    "storm": "kernels, at most",
    "other_than_predicted": "the static check predicts",
    "grid_that_does_not_exist": "grid (1, 65536, 1)",
}
INTERPRETED = {
    "two programs store the same address": (
        "at = tl.program_id(0).to(tl.int64) * BLOCK_SIZE",
        "at = tl.program_id(0).to(tl.int64) // 2 * BLOCK_SIZE",
        "store the same address",
    ),
    "a mask is missing": ("tl.load(z + at, mask=mask, other=0.0)", "tl.load(z + at)", "reads outside of every tensor"),
    "a mask of stores is missing": ("out.dtype.element_ty), mask=mask)", "out.dtype.element_ty))", "stores outside"),
    "a program reads what another stores": (
        "tl.load(z + at, mask=mask, other=0.0)",
        "tl.load(out + (at + BLOCK_SIZE) % numel)",
        "reads what",
    ),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name: str, tmp_path: Path) -> None:
    faults = child.run("tests.standin.sabotage", name, cache=tmp_path)
    assert any(COMPILED[name] in fault for fault in faults), faults


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, fault = INTERPRETED[name]
    case = CASES["tanh_scaled"][0]
    assert judge(planned(case)) == []
    with mutated(tanh_scaled, old, new, tmp_path) as wrong:
        monkeypatch.setattr(tanh_scaled, "scale", wrong.scale)
        found = judge(planned(case))
    assert any(fault in one for one in found), found


def test_rows_on_an_axis_that_ends_at_65535(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(kernel: object, grid: tuple[int, ...], *rest: object) -> Launch:
        return Launch(kernel, grid[::-1], *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(wavelet, "Launch", turned)
    with pytest.raises(ValueError, match="split the batch"):
        grids_exist("wavelet_fix", (DEVICE_PIXELS // 16, 1))


def test_kernels_on_host_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "obstacle", lambda _: "")
    with pytest.raises(AssertionError):
        host_tensors_run_on_the_host("triton", monkeypatch)


def test_a_reference_that_copies_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def reference(self: object) -> torch.Tensor:
        return torch.tensor([1.0], device="meta")

    monkeypatch.setattr(REGISTRY["tanh_scaled"], "reference", reference)
    with pytest.raises(AssertionError, match="host data"):
        form_can_be_captured("tanh_scaled", "reference")
