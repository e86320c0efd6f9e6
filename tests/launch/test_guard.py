"""The launch guard: failures of kernels end in the reference's result and one notice, other failures propagate."""

from __future__ import annotations

import inspect
import logging
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tinysr_kernels.launch import guard
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import REGISTRY, call

Z = torch.linspace(-4, 4, 24).reshape(1, 2, 3, 4)


class FakeTriton:
    """Raises errors from code whose module is called triton."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        self.calls = 0
        source = "def raise_it(make):\n    raise make()\n"
        names: dict[str, Any] = {"__name__": "triton.runtime.driver"}
        exec(compile(source, "driver.py", "exec"), names)  # noqa: S102  code of a module with that name
        self._raise, self._error = names["raise_it"], error

    def run(self, launch: Launch, pdl: bool = False) -> None:
        self.calls += 1
        self._raise(self._error)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Kernels are launched, not interpreted, and nothing is barred before or after."""
    monkeypatch.setattr(call, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(guard, "interpreting", lambda: False)
    monkeypatch.delenv(guard.SWITCH, raising=False)
    guard.forget()
    yield
    guard.forget()


def failing(monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException]) -> FakeTriton:
    fake = FakeTriton(error)
    monkeypatch.setattr(Launch, "run", lambda self, pdl=False: fake.run(self, pdl))
    return fake


def tanh_scaled(z: torch.Tensor = Z) -> torch.Tensor:
    return REGISTRY["tanh_scaled"](z, 3.0).compute()


def expected(z: torch.Tensor = Z) -> torch.Tensor:
    return REGISTRY["tanh_scaled"](z, 3.0).reference()


def out_of_resources() -> BaseException:
    from triton.runtime.errors import OutOfResources

    return OutOfResources(300_000, 232_448, "shared memory")


def compilation_error() -> BaseException:
    from triton.compiler.errors import CompilationError

    return CompilationError("x = y", None, "no such thing")


KERNEL = {
    "too large": (out_of_resources, "autotune show"),
    "does not compile": (compilation_error, "tinysr doctor"),
    "too large for CUDA": (
        lambda: RuntimeError("Triton Error [CUDA]: too many resources requested for launch"),
        "tinysr doctor",
    ),
}
EVERYTHING = {
    "no code for this GPU": (
        lambda: RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
        "update PyTorch and the driver",
    ),
    "no compiler": (lambda: RuntimeError("Failed to find C compiler. Please specify via CC"), "apt-get install gcc"),
    "no Python.h": (lambda: subprocess.CalledProcessError(1, ["gcc"]), "python3-dev"),
    "cache not writable": (lambda: PermissionError(13, "Permission denied", "/root/.triton"), "TRITON_CACHE_DIR"),
    "unknown GPU": (lambda: RuntimeError("Triton only supports CUDA 10.0 or higher"), "update PyTorch"),
}
NOT_THE_KERNELS = {
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "device error": lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "sticky error in a launch": lambda: RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "memory in a launch": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "a slip of ours": lambda: ValueError("expected a multiple of 16"),
    "Ctrl-C": KeyboardInterrupt,
}


@pytest.mark.parametrize("kind", KERNEL)
def test_a_failing_kernel_is_barred_alone(kind: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    error, remedy = KERNEL[kind]
    fake = failing(monkeypatch, error)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(tanh_scaled(), expected())
        assert torch.equal(tanh_scaled(), expected())
    assert fake.calls == 1
    (record,) = caplog.records
    assert "tanh_scaled" in record.message
    assert "PyTorch computes instead" in record.message
    assert remedy in record.message
    tanh_scaled(Z.half())  # another variant is tried
    assert fake.calls == 2
    assert len(guard._barred) == 2


@pytest.mark.parametrize("kind", EVERYTHING)
def test_what_every_kernel_needs_bars_all(kind: str, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    error, remedy = EVERYTHING[kind]
    fake = failing(monkeypatch, error)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(tanh_scaled(), expected())
        assert torch.equal(tanh_scaled(Z.half()), expected(Z.half()))
        image = torch.rand(1, 3, 4, 4)
        assert torch.equal(REGISTRY["clamp_image"](image).compute()[0], image)
    assert fake.calls == 1
    (record,) = caplog.records
    assert "cannot build kernels" in record.message
    assert remedy in record.message
    guard.forget()
    tanh_scaled()
    assert fake.calls == 2


@pytest.mark.parametrize("kind", NOT_THE_KERNELS)
def test_other_failures_propagate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error = NOT_THE_KERNELS[kind]
    failing(monkeypatch, error)
    with pytest.raises(type(error())):
        tanh_scaled()
    assert not guard.anything_barred()


def test_an_error_of_torch_propagates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError or OSError that Triton did not raise."""

    def run(self: Launch, pdl: bool = False) -> None:
        torch.ones(2) @ torch.ones(3)

    monkeypatch.setattr(Launch, "run", run)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        tanh_scaled()


@pytest.mark.parametrize("why", ["switched off", "interpreter", "capturing"])
def test_nothing_is_hidden(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From tests of kernels, and within a capture, which the error has ended."""
    if why == "switched off":
        monkeypatch.setenv(guard.SWITCH, "0")
    elif why == "interpreter":
        monkeypatch.setattr(guard, "interpreting", lambda: True)
    else:
        monkeypatch.setattr(guard, "_capturing", lambda device: True)
    failing(monkeypatch, out_of_resources)
    with pytest.raises(type(out_of_resources())):
        tanh_scaled()


def test_tritons_own_message_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, caplog: Any) -> None:
    """What the installed Triton raises where there is none."""
    from triton.runtime import build

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    options = [p for p in inspect.signature(build._build).parameters.values() if p.default is p.empty][3:]  # lists

    def run(self: Launch, pdl: bool = False) -> None:
        build._build("name", "name.c", str(tmp_path), *([] for _ in options))

    monkeypatch.setattr(Launch, "run", run)
    with caplog.at_level(logging.WARNING), using("triton"):
        assert torch.equal(tanh_scaled(), expected())
    assert "apt-get install gcc" in caplog.text
