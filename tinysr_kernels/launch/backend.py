"""The backends: `triton` runs the operators' kernels on a GPU, or on CPU tensors in Triton's interpreter when
TRITON_INTERPRET=1; `library` calls PyTorch's libraries (cuDNN, cuBLAS, SDPA, oneDNN) in the compute dtype, on GPUs
without kernels and on the CPU; `reference` computes in plain PyTorch in float32 or wider, on any device torch knows.

The backend belongs to the calling thread. Without `using`, it is `auto`: on a GPU the kernels or, where they cannot
run, the libraries; on the CPU the reference.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar

import torch

from tinysr_kernels.errors import InputError
from tinysr_kernels.launch.device import MINIMUM_CAPABILITY
from tinysr_kernels.launch.kernel import interpreting, triton_is_installed

BACKENDS: tuple[str, ...] = ("auto", "triton", "library", "reference")

_current: ContextVar[str] = ContextVar("backend", default="auto")


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Operators called inside by this thread run on this backend. InputError for an unknown one."""
    _check(backend)
    token = _current.set(backend)
    try:
        yield
    finally:
        _current.reset(token)


def choose_backend(backend: str, device: torch.device) -> str:
    """ "triton", "library" or "reference": what runs on the device when the caller asks for `backend`.

    InputError for an unknown backend, and for "triton" where it cannot run, with the reason.
    """
    _check(backend)
    if backend in ("library", "reference"):
        return backend
    if device.type == "cpu" and backend == "auto":
        return "reference"
    found = obstacle(device)
    if backend == "triton" and found:
        raise InputError(
            f"backend 'triton' cannot run: {found}; use backend='auto', backend='library' or backend='reference'"
        )
    return "library" if found else "triton"


def kernels_run_on(device: torch.device) -> bool:
    """Whether operators called now by this thread run their kernels on tensors of this device.

    A model whose backend is "triton" also computes on the host, on parts of images that are too large for the GPU.
    """
    backend = _current.get()
    if backend in ("library", "reference") or (backend == "auto" and device.type == "cpu"):
        return False
    return not obstacle(device)


def libraries_run_on(device: torch.device) -> bool:
    """Whether operators called now by this thread call PyTorch's libraries where their kernels do not run.

    On the CPU only if asked for.
    """
    backend = _current.get()
    return backend == "library" or (backend != "reference" and device.type != "cpu")


def statistics_pay() -> bool:
    """Whether networks should ask producers for the statistics of their results.

    A kernel takes them from its registers. A library would have to read the result once more, as its own norm does.
    """
    return _current.get() != "library"


def _check(backend: str) -> None:
    if backend not in BACKENDS:
        raise InputError(f"backend must be one of {BACKENDS}, found {backend!r}")


def obstacle(device: torch.device) -> str:
    """Why kernels cannot run on the device; empty where they can."""
    if not triton_is_installed():
        return "Triton is not installed"
    if device.type == "cpu":
        return "" if interpreting() else "on the CPU it needs TRITON_INTERPRET=1 in the environment"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"there are no kernels for {device.type} devices of this build of torch"
    found = _capability(device)
    if found < MINIMUM_CAPABILITY:
        wanted = ".".join(map(str, MINIMUM_CAPABILITY))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, needed is {wanted}"
    return ""


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """Cached, because every call of an operator asks for it."""
    return torch.cuda.get_device_capability(device)
