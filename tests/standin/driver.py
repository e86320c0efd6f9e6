"""A stand-in for Triton's CUDA driver: binder, specialization and compiler are Triton's, launches are recorded.

Only in a process that imported Triton with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torch import device as Device

import tinysr_kernels.ops.call as operators
from tinysr_kernels.first_use.target import TargetDriver, active
from tinysr_kernels.launch.hardware import block_shared_bytes
from tinysr_kernels.launch.kernel import Kernel


class Driver(TargetDriver):
    """Loads every binary, and keeps the name and the grid of every launch."""

    def __init__(self, arch: int, load: Callable[..., Any] = lambda *_: None) -> None:
        """load: called in place of loading; what it raises is the driver's error."""
        super().__init__(arch)
        self.launches: list[tuple[str, tuple[int, ...], bool]] = []
        self.shared = block_shared_bytes(arch)
        self.load = load
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=self._properties)

    def get_active_torch_device(self) -> Device:
        """Where Triton's helpers would make tensors."""
        return Device("meta")

    def _properties(self, _index: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared, "multiprocessor_count": 132, "warpSize": 32}

    def _load(self, *args: Any) -> tuple[int, ...]:
        self.load(*args)
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What CompiledKernel launches with."""

        def launch(x: int, y: int, z: int, *_: Any) -> None:
            self.launches.append((source.fn.__name__, (x, y, z), bool(getattr(metadata, "launch_pdl", False))))

        return launch


class _Stop(Exception):
    """The front end has finished."""


class _Loaded:
    """Stands for a CompiledKernel whose code was not generated."""

    function, packed_metadata = 1, (4, 1, 0)

    def __init__(self, source: Any, options: dict[str, Any]) -> None:
        self.source, self.options = source, options

    def launch_metadata(self, *_: Any) -> None:
        """None, as without a profiler."""

    def run(self, *args: Any) -> None:
        """Load and launch on the active driver."""
        from triton.runtime import driver

        driver.active.utils.load_binary(self.source.fn.__name__, b"", 0, 0)
        driver.active.launcher_cls(self.source, SimpleNamespace(**self.options))(*args)


@contextlib.contextmanager
def standing_in(
    driver: Any, stop: str = "cubin", seen: Callable[[Any, dict[str, Any]], None] = lambda *_: None
) -> Iterator[Any]:
    """Kernels of any tensors are launched on the driver inside.

    stop: compile to the binder's "signature" alone, through the front end to "ttir", or to "cubin". seen: called with
    Triton's source and options of everything that is compiled.
    """
    import triton.compiler

    compiler = triton.compiler.compile

    def compile_less(source: Any, target: Any = None, options: Any = None, **rest: Any) -> Any:
        seen(source, options)
        if stop == "cubin":
            return compiler(source, target=target, options=options, **rest)
        if stop == "ttir":
            to_ir = source.make_ir

            def make_ir(*args: Any, **kwargs: Any) -> Any:
                to_ir(*args, **kwargs)
                raise _Stop

            source.make_ir = make_ir
            with contextlib.suppress(_Stop):
                compiler(source, target=target, options=options, **rest)
        return _Loaded(source, options)

    with pytest.MonkeyPatch.context() as patch, active(driver):
        patch.setattr(triton.compiler, "compile", compile_less)
        patch.setattr(operators, "kernels_run_on", lambda device: True)
        forget_made()
        try:
            yield driver
        finally:
            forget_made()


def forget_made() -> None:
    """Make every kernel anew at its next launch: Triton keeps the compiler, and what it compiled, in the function."""
    for module in list(sys.modules.values()):
        for value in list(vars(module).values()):
            if type(value) is Kernel:
                vars(value).pop("made", None)
