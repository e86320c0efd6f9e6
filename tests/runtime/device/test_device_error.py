"""Failures of a GPU: recognized, named with a remedy, and the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tinysr_kernels
from tests.files.runs import run, save
from tests.runtime.device.fake_cuda import fake_cuda
from tests.runtime.sample_images import FakeModel
from tinysr_kernels import DeviceError
from tinysr_kernels.files.batch import Settings
from tinysr_kernels.runtime import runner
from tinysr_kernels.runtime.device.device_error import device_error

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (torch.AcceleratorError(ILLEGAL), "start it again"),
        (RuntimeError("Triton Error [CUDA]: misaligned address"), "start it again"),
        (torch.AcceleratorError("CUDA error: no kernel image is available for execution"), "no code for the GPU"),
        (torch.AcceleratorError("CUDA error: all CUDA-capable devices are busy or unavailable"), "another program"),
        (RuntimeError("CUDA error: CUDA driver version is insufficient for CUDA runtime version"), "update the GPU's"),
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), "nvidia-smi"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), "start it again"),
    ],
)
def test_what_the_driver_says(error: Exception, remedy: str) -> None:
    found = device_error(error)
    assert found is not None
    assert str(error).partition("\n")[0] in str(found)
    assert remedy in str(found)
    assert "TORCH_USE_CUDA_DSA" not in str(found)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"),
        ValueError("CUDA error: said by somebody else"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_failure_of_the_device(error: BaseException) -> None:
    assert device_error(error) is None


def test_a_call_names_it_and_does_not_try_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tinysr_kernels.compile("demo", device="cpu")
    calls = []

    def fail(*_: Any, **__: Any) -> Any:
        calls.append(1)
        raise torch.AcceleratorError(ILLEGAL)

    monkeypatch.setattr(runner.Runner, "_attempt", fail)
    with pytest.raises(DeviceError, match=r"illegal memory access was encountered; .*start it again") as caught:
        model(torch.zeros(3, 8, 8))
    assert isinstance(caught.value.__cause__, torch.AcceleratorError)
    assert len(calls) == 1


@pytest.mark.parametrize("where", ["before", "after"])
def test_it_is_named_around_the_network_too(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of a GPU surface wherever the host next waits: while the image is converted, or asked about a capture."""

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError(ILLEGAL)

    with fake_cuda():
        model = tinysr_kernels.compile("demo", dtype="float32", backend="reference", cuda_graphs=False)
        if where == "before":
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fail)
        else:
            monkeypatch.setattr("tinysr_kernels.runtime.images.arrays.resample", fail)
        with pytest.raises(DeviceError, match=r"illegal memory access was encountered; .*start it again"):
            model(torch.zeros(3, 8, 8))


class Lost(FakeModel):
    """A model whose GPU fails with the second image."""

    images = 0

    def enlarge(self, rgb: torch.Tensor, **options: Any) -> torch.Tensor:
        self.images += 1
        if self.images == 2:
            raise DeviceError("CUDA error: unspecified launch failure; start it again")
        return super().enlarge(rgb, **options)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_run_ends_where_the_device_is_lost(workers: int, tmp_path: Path) -> None:
    for name in "abcdefgh":
        save(tmp_path / "in" / f"{name}.png")
    results = run([tmp_path / "in"], tmp_path / "out", Settings(workers=workers), Lost())
    assert [result.status for result in results[:-1]] == ["done"] * (len(results) - 1)
    assert results[-1].status == "failed"
    assert results[-1].error["type"] == "DeviceError"
    assert len(results) < 8
