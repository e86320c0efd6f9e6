"""Launch plans: the kernel launches of a call as data, made from tensors of any device (meta included).

A call runs its plan; ahead-of-time compilation, tracing, tuning and tests read the same plan, so what is checked is
what is launched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.kernel import Kernel

GRID_LIMITS = ((1 << 31) - 1, 65535, 65535)
"""Programs per dimension of a grid, on every architecture."""


@dataclass(frozen=True)
class Launch:
    """One kernel launch: up to three grid dimensions, every argument by name, warps and pipeline stages.

    Tensors are dense and on one device; numbers are Python ints and floats (float32 in the kernel).
    """

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        """ValueError for a grid that CUDA refuses (CUDA programming guide, "Technical Specifications")."""
        for size, most in zip(self.grid, GRID_LIMITS, strict=False):
            if not 1 <= size <= most:
                name = self.kernel.function.__name__
                raise ValueError(f"{name} has the grid {self.grid}, possible is up to {GRID_LIMITS}; split the batch")

    def run(self, pdl: bool = False) -> None:
        """Launch on the device of the tensors, which need not be the current one.

        pdl: programmatic dependent launch (CUDA programming guide; compute capability 9.0): the kernel may start before
        the previous one has completed. Every kernel waits itself for its inputs (`await_inputs` in
        ops/device_functions.py).
        """
        tensors = (v for v in self.arguments.values() if isinstance(v, Tensor))
        device = next(tensors).device
        elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
        with torch.cuda.device(device) if elsewhere else contextlib.nullcontext():
            self.kernel.made[self.grid](**self.arguments, **self.options(pdl))

    def options(self, pdl: bool = False) -> dict[str, Any]:
        """The launch's options, as Triton names them; pdl: see `run`."""
        # a * b + c in one rounding, as all Tritons to 3.9 do by default and later ones do not
        options: dict[str, Any] = {"enable_fp_fusion": True}
        options |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if pdl:
            options["launch_pdl"] = True
        return options


@dataclass(frozen=True)
class Library:
    """A call of a library (cuBLASLt, cuDNN, SDPA): `function(**arguments)` writes into the tensors among its arguments.

    kernels: the number of kernels it launches, as far as known.
    """

    function: Callable[..., None]
    arguments: Mapping[str, Any]
    kernels: int = 1

    def run(self, pdl: bool = False) -> None:
        """Call the library, which launches on the device of the tensors, in stream order."""
        self.function(**self.arguments)


@dataclass(frozen=True)
class Plan:
    """The result tensors of a call, not yet computed, and the launches that compute them, in order."""

    result: Any
    launches: tuple[Launch | Library, ...]

    def run(self, pdl: bool = False) -> Any:
        """Launch everything and return the result; pdl: see `Launch.run`."""
        for launch in self.launches:
            launch.run(pdl)
        return self.result

    @property
    def kernels(self) -> int:
        """Number of kernels that run on the device."""
        return sum(launch.kernels if isinstance(launch, Library) else 1 for launch in self.launches)


class Tunable(Protocol):
    """A call whose launch configuration can be chosen and measured; the operators of `ops/call.py` are such calls."""

    name: ClassVar[str]
    config: ClassVar[type]

    def lookup_key(self) -> tuple[Any, ...]:
        """Hashable; calls of equal keys get the same configuration."""

    def bucket(self) -> str:
        """A short text; calls of equal text share a configuration."""

    def heuristic(self, gpu: Gpu) -> Any:
        """A configuration that always works."""

    def space(self, gpu: Gpu) -> Iterable[Any]:
        """The configurations worth measuring."""

    def plan(self, config: Any) -> Plan:
        """The launches; ValueError for a configuration that cannot serve the call."""

    def on_meta(self) -> Tunable:
        """The same call on tensors without data."""


def cdiv(extent: int, block: int) -> int:
    """How many blocks cover the extent (ceiling division)."""
    return -(-extent // block)


def next_power_of_2(n: int, least: int = 16, most: int = 1 << 30) -> int:
    """The smallest power of two that is not below n, clamped to least and most (themselves powers of two)."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def programs_wanted(gpu: Gpu) -> int:
    """Programs that keep every multiprocessor busy: two each, so that one computes while the other loads."""
    return 2 * gpu.multiprocessors
