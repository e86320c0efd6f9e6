"""Where kernels run, and the errors where they cannot."""

from __future__ import annotations

import threading

import pytest
import torch

from tinysr_kernels import InputError
from tinysr_kernels.launch import backend
from tinysr_kernels.launch.backend import choose_backend, kernels_run_on, libraries_run_on, using
from tinysr_kernels.launch.device import has_bfloat16
from tinysr_kernels.launch.kernel import Kernel, jit, tl

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A fake GPU; tests may change its capability."""
    facts = {"capability": (9, 0)}
    backend._capability.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: facts["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    return facts


@pytest.mark.parametrize(
    ("wanted", "interpret", "expected"),
    [
        ("auto", "1", "reference"),
        ("reference", "1", "reference"),
        ("library", "1", "library"),
        ("triton", "1", "triton"),
        ("auto", "0", "reference"),
    ],
)
def test_cpu(wanted: str, interpret: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow, so it runs only when selected explicitly."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert choose_backend(wanted, CPU) == expected


def test_cpu_without_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        choose_backend("triton", CPU)


def test_gpu(fake_gpu: dict) -> None:
    assert choose_backend("auto", CUDA) == "triton"
    assert choose_backend("triton", CUDA) == "triton"
    assert choose_backend("library", CUDA) == "library"
    assert choose_backend("reference", CUDA) == "reference"


def test_old_gpu(fake_gpu: dict) -> None:
    fake_gpu["capability"] = (7, 5)
    assert choose_backend("auto", CUDA) == "library"
    with pytest.raises(InputError, match=r"Some GPU has compute capability 7\.5, needed is 8\.0.*backend='library'"):
        choose_backend("triton", CUDA)
    assert libraries_run_on(CUDA)
    with using("reference"):
        assert not libraries_run_on(CUDA)


def test_without_triton(fake_gpu: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "triton_is_installed", lambda: False)
    assert choose_backend("auto", CUDA) == "library"
    with pytest.raises(InputError, match="Triton is not installed"):
        choose_backend("triton", CUDA)


@pytest.mark.parametrize("run", [lambda: choose_backend("cuda", CPU), lambda: using("cuda").__enter__()])
def test_unknown(run) -> None:
    with pytest.raises(InputError, match="found 'cuda'"):
        run()


@pytest.mark.parametrize("name", backend.BACKENDS)
def test_host_tensors_beside_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the interpreter, a model with the backend "triton" computes on the host by the reference."""
    monkeypatch.delenv("TRITON_INTERPRET")
    with using(name):
        assert not kernels_run_on(CPU)
        assert libraries_run_on(CPU) == (name == "library")


@pytest.mark.parametrize(
    ("capability", "hip", "expected"), [((7, 5), None, False), ((8, 0), None, True), ((6, 0), "7", True)]
)
def test_bfloat16(
    capability: tuple[int, int], hip: str | None, expected: bool, fake_gpu: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVIDIA's GPUs have it from 8.0 on; AMD's count otherwise, and PyTorch computes in it on all of them."""
    has_bfloat16.cache_clear()
    fake_gpu["capability"] = capability
    monkeypatch.setattr(torch.version, "hip", hip)
    assert has_bfloat16(CUDA) == expected
    assert has_bfloat16(CPU)
    has_bfloat16.cache_clear()


def test_using_is_thread_local() -> None:
    seen = []
    with using("triton"):
        assert kernels_run_on(CPU)
        with using("reference"):
            assert not kernels_run_on(CPU)
        other = threading.Thread(target=lambda: seen.append(kernels_run_on(CPU)))
        other.start()
        other.join()
        assert kernels_run_on(CPU)
    assert not kernels_run_on(CPU)
    assert seen == [False]


def test_kernels_before_triton() -> None:
    """A kernel knows its arguments without Triton; `tl` has no attributes outside kernels."""

    @jit
    def kernel(x, count, BLOCK: tl.constexpr):
        tl.store(x, count)

    assert isinstance(kernel, Kernel)
    assert kernel.names == ("x", "count", "BLOCK")
    assert kernel.constants == {"BLOCK"}
    with pytest.raises(AttributeError, match=r"tl\.load exists inside kernels only"):
        _ = tl.load
