"""Devices: what is true of one that cannot be used, and what is available instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tinysr_kernels
from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.device.choose import choose_device

WRONG = {
    "mps": r"'mps' is not supported: networks run on the CPU and on CUDA GPUs",
    "xpu": "'xpu' is not supported",
    "xpu:1": "'xpu:1' is not supported",
    "meta": "'meta' holds no data",
    "cpu:1": "'cpu:1' does not exist",
    "tpu": "'tpu' is unknown",
    "npu": "'npu' is unknown",
    "hip": "'hip' is not supported",
    "CUDA": "'CUDA' is unknown",
    "": "'' is unknown",
    "cuda:": "'cuda:' is unknown",
    "cuda:-1": "'cuda:-1' is unknown",
    "cuda:99999999999999": "'cuda:99999999999999' is unknown",
    "cu\0da": "is unknown",
}


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_available", True), ("device_count", 2), ("current_device", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)


@pytest.mark.parametrize("device", WRONG)
def test_what_is_wrong_is_named_with_what_is_there(device: str, without_gpu: None) -> None:
    for given in (device, "demo") if device in ("mps", "xpu") else (device,):
        with pytest.raises(InputError, match=rf"{WRONG[device]}.*; available here: cpu$"):
            choose_device(device) if given == device else tinysr_kernels.compile(given, device=device)


@pytest.mark.parametrize("device", [True, 1.5, [1], {}, b"cpu", object()])
def test_what_is_no_device_at_all(device: Any, without_gpu: None) -> None:
    with pytest.raises(InputError, match=r"device must be a name .*; available here: cpu$"):
        choose_device(device)


def test_gpus_that_are_there_and_that_are_not(two_gpus: None) -> None:
    for device in ("cuda:7", 7, torch.device("cuda", 7)):
        with pytest.raises(InputError, match=r"7'? does not exist; available here: cpu, cuda:0, cuda:1$"):
            choose_device(device)
    for device, index in ((None, 1), ("cuda", 1), ("cuda:0", 0), (0, 0), (torch.device("cuda", 1), 1)):
        assert choose_device(device) == torch.device("cuda", index)
    assert choose_device("cpu:0") == torch.device("cpu")


def test_cuda_without_a_gpu(without_gpu: None) -> None:
    assert choose_device() == torch.device("cpu")
    for device in ("cuda", "cuda:0", "cuda:7", 0):
        with pytest.raises(InputError, match=r"was asked for, but (this torch is a CPU build|torch finds no CUDA)"):
            choose_device(device)


def test_messages_are_bounded() -> None:
    with pytest.raises(InputError) as caught:
        choose_device("x" * 100_000)
    assert len(str(caught.value)) < 200
