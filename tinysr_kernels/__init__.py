"""Real-time one-step diffusion super-resolution on NVIDIA GPUs.

    import tinysr_kernels
    model = tinysr_kernels.compile("demo")
    upscaled = model(image)          # PIL image, numpy array or torch tensor; the result has the same type

Importing this package is cheap: torch, Triton and the image libraries are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tinysr_kernels._version import __version__
from tinysr_kernels.errors import (
    CheckpointError,
    DeviceError,
    InputError,
    NonFiniteOutput,
    OutOfMemory,
    TinySRError,
)

if TYPE_CHECKING:
    from tinysr_kernels import ops
    from tinysr_kernels.runtime.autoencoder.accelerate import accelerate, restore
    from tinysr_kernels.runtime.compiled import CompiledSR
    from tinysr_kernels.runtime.compiling import compile, describe

__all__ = [
    "CheckpointError",
    "CompiledSR",
    "DeviceError",
    "InputError",
    "NonFiniteOutput",
    "OutOfMemory",
    "TinySRError",
    "__version__",
    "accelerate",
    "compile",
    "describe",
    "ops",
    "restore",
]

_LAZY = {
    "CompiledSR": "runtime.compiled",
    "accelerate": "runtime.autoencoder.accelerate",
    "compile": "runtime.compiling",
    "describe": "runtime.compiling",
    "restore": "runtime.autoencoder.accelerate",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "ops":
        return importlib.import_module("tinysr_kernels.ops")
    if name in _LAZY:
        return getattr(importlib.import_module(f"tinysr_kernels.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
