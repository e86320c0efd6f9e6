"""Every way in which Triton may fail on a GPU, through the guard to a picture: `python -m tests.standin.failures`.

Most errors are Triton's own: where they come from is broken, not the call. Prints JSON.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

import tinysr_kernels
import tinysr_kernels.ops.call as operators
from tests.standin.driver import Driver, standing_in
from tinysr_kernels.launch import guard
from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.image.kernels import tanh_scaled as kernels

ARCH = 90
UNKNOWN_ARCH = 20
SCALE = 3.0


@jit
def refused_by_the_front_end(z, out, gain, numel, BLOCK_SIZE: tl.constexpr):
    """Takes what the true kernel takes, and an attribute that nothing has."""
    tl.store(out, z.no_such_thing)


def in_triton(error: Callable[[], Exception]) -> Callable[..., None]:
    """A function that raises the error as Triton's driver, which is written in C, would."""
    names: dict[str, Any] = {"__name__": "triton.backends.nvidia.driver", "error": error}
    exec("def load(*_):\n    raise error()\n", names)  # noqa: S102  code of a module with that name
    return names["load"]


def cuda_error(text: str) -> Callable[..., None]:
    """Loading fails with one of CUDA's errors."""
    return in_triton(lambda: RuntimeError(f"Triton Error [CUDA]: {text}"))


def build_something(*_: Any) -> None:
    """Loading builds a module in C, as the launcher of the CUDA driver does."""
    from triton.runtime.build import compile_module_from_src

    compile_module_from_src("int standing_in;\n", "standing_in")


@dataclass(frozen=True)
class Failure:
    """What is broken. stop: see `standing_in`; patch: breaks what is not the driver."""

    driver: Callable[[], Driver]
    stop: str = "signature"
    patch: Callable[[pytest.MonkeyPatch], Any] = lambda _: None


def _short_of(memory: int) -> Driver:
    driver = Driver(ARCH)
    driver.shared = memory
    return driver


def _without_compiler(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PATH", tempfile.gettempdir())
    patch.delenv("CC", raising=False)


FAILURES = {
    "no kernel image": Failure(lambda: Driver(ARCH, cuda_error("no kernel image is available for execution"))),
    "shared memory": Failure(lambda: _short_of(-1), "cubin"),
    "no C compiler": Failure(lambda: Driver(ARCH, build_something), patch=_without_compiler),
    "no Python.h": Failure(lambda: Driver(ARCH, build_something), patch=lambda p: p.setenv("CC", "false")),
    "no folder to write to": Failure(
        lambda: Driver(ARCH), "cubin", lambda p: p.setenv("TRITON_CACHE_DIR", f"{__file__}/cache")
    ),
    "unknown GPU": Failure(lambda: Driver(UNKNOWN_ARCH), "cubin"),
    "does not compile": Failure(
        lambda: Driver(ARCH), "ttir", lambda p: p.setattr(kernels, "scale", refused_by_the_front_end)
    ),
}
NOT_THE_KERNELS = ("out of memory", "an illegal memory access was encountered")


class _Notices(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextlib.contextmanager
def noticed() -> Iterator[list[str]]:
    """The warnings of the package, and nothing barred before or after."""
    handler = _Notices()
    logging.getLogger("tinysr_kernels").addHandler(handler)
    guard.forget()
    try:
        yield handler.messages
    finally:
        guard.forget()
        logging.getLogger("tinysr_kernels").removeHandler(handler)


def fail(failure: Failure, compute: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """Whether the result, twice, is that of PyTorch's libraries, and what was said."""
    with mock.patch.object(operators, "libraries_run_on", return_value=True):
        expected = compute()
    with pytest.MonkeyPatch.context() as patch, noticed() as notices:
        failure.patch(patch)
        with standing_in(failure.driver(), failure.stop):
            equal = [torch.equal(compute(), expected) for _ in range(2)]
    return {"equal": equal, "notices": notices}


def operator() -> torch.Tensor:
    """One operator, of one kernel."""
    return REGISTRY["tanh_scaled"](torch.linspace(-4, 4, 24).reshape(1, 2, 3, 4), SCALE).compute()


def propagates(text: str) -> bool:
    """Whether a CUDA error that is not the kernels' reaches the caller, and bars nothing."""
    with noticed() as notices, standing_in(Driver(ARCH, cuda_error(text)), "signature"):
        try:
            operator()
        except RuntimeError as error:
            return text in str(error) and not notices and not guard.anything_barred()
    return False


def main() -> None:
    """Print what each failure led to: of the kind's name, whether the results are right, and the notices."""
    found: dict[str, Any] = {kind: fail(failure, operator) for kind, failure in FAILURES.items()}
    found |= {text: propagates(text) for text in NOT_THE_KERNELS}
    model = tinysr_kernels.compile("demo", device="cpu", backend="reference")
    image = torch.rand(1, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for kind in ("no kernel image", "no C compiler"):
            found[f"picture: {kind}"] = fail(FAILURES[kind], lambda: model(image))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"
    main()
