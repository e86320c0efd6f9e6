"""What an operation wants launched, as data: made from tensors of any device (meta included), run on real ones.

Ahead-of-time compilation and tests read the same plan that a call runs, so that what is checked is what is launched.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.device import MINIMUM_CAPABILITY, Gpu
from tinysr_kernels.launch.kernel import Kernel

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Launch:
    """One kernel launch: up to three grid dimensions, every argument by name, warps and pipeline stages.

    Tensors are dense and on one device; numbers are Python ints and floats (float32 in the kernel).
    """

    kernel: Kernel
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    warps: int
    stages: int

    def run(self, pdl: bool = False) -> None:
        """Launch on the device of the tensors, which need not be the current one.

        pdl: by programmatic dependent launch (CUDA programming guide; compute capability 9.0), that is, as soon as the
        launch before lets it. Every kernel waits by itself for what it reads (`await_inputs` of ops/device_functions.py).
        """
        tensors = (v for v in self.arguments.values() if isinstance(v, Tensor))
        device = next(tensors).device
        options: dict[str, Any] = {"num_warps": self.warps, "num_stages": self.stages}
        if pdl:
            options["launch_pdl"] = True
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel.made[self.grid](**self.arguments, **options)


@dataclass(frozen=True)
class Library:
    """A library's kernels in place of our own: `function(**arguments)` writes into the tensors that it is given.

    kernels: how many launches it makes, as far as is known.
    """

    function: Callable[..., None]
    arguments: Mapping[str, Any]
    kernels: int = 1

    def run(self, pdl: bool = False) -> None:
        """Call the library, which launches on the device of the tensors, and behind all that was launched before."""
        self.function(**self.arguments)


@dataclass(frozen=True)
class Plan:
    """A call's result, not yet computed, and the launches that compute it, in order."""

    result: Any
    launches: tuple[Launch | Library, ...]

    def run(self, pdl: bool = False) -> Any:
        """Launch everything and return the result; pdl: see `Launch.run`."""
        for launch in self.launches:
            launch.run(pdl)
        return self.result

    @property
    def kernels(self) -> int:
        """How many kernels run on the device."""
        return sum(launch.kernels if isinstance(launch, Library) else 1 for launch in self.launches)


@dataclass(frozen=True)
class Implementation:
    """An operation's kernels. Every function takes the operator's arguments by name and ignores those it needs not.

    config: the dataclass of its launch configurations, ints, strings and bools only.
    bucket(**arguments): the calls that share a configuration, as a short text.
    heuristic(gpu, **arguments): a configuration that always compiles and spills no registers.
    plan(config, **arguments): the launches; ValueError for arguments that the operator refuses.
    space(gpu, **arguments): the configurations worth measuring for a call, repetitions allowed, among them every
        form that applies to it.
    modules: names of the modules that hold the kernels, besides plan's own.
    dtypes: what the kernels read and write of floating tensors; capability: the lowest compute capability they run on.
    """

    config: type
    bucket: Callable[..., str]
    heuristic: Callable[..., Any]
    plan: Callable[..., Plan]
    space: Callable[..., Iterable[Any]]
    modules: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES
    capability: tuple[int, int] = MINIMUM_CAPABILITY

    @functools.cached_property
    def read(self) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        """Picks from a call's arguments those that bucket and heuristic look at, which their parameters name.

        `**_` is looked at by nobody; where one takes the rest under another name, it may look at any.
        """
        parameters = [p for f in (self.bucket, self.heuristic) for p in inspect.signature(f).parameters.values()]
        if any(p.kind is p.VAR_KEYWORD and p.name != "_" for p in parameters):
            return lambda arguments: tuple(arguments.values())
        names = list(dict.fromkeys(p.name for p in parameters if p.name not in ("gpu", "_")))
        if len(names) == 1:  # of a single name, itemgetter makes no tuple
            return lambda arguments: (arguments[names[0]],)
        return operator.itemgetter(*names)

    def takes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the kernels compute this call: dtypes that they know, nothing empty, everything on one device."""
        tensors = [v for v in arguments.values() if isinstance(v, Tensor)]
        dtypes = [t.dtype for t in tensors] + [v for v in arguments.values() if isinstance(v, torch.dtype)]
        return all(t.numel() > 0 and t.device == tensors[0].device for t in tensors) and all(
            dtype in self.dtypes or not dtype.is_floating_point for dtype in dtypes
        )


def blocks(extent: int, block: int) -> int:
    """How many blocks cover the extent."""
    return -(-extent // block)


def power_of_2(n: int, least: int = 16, most: int = 1 << 30) -> int:
    """The smallest power of two that is not below n, between least and most (themselves powers of two)."""
    return min(max(1 << max(n - 1, 0).bit_length(), least), most)


def programs_wanted(gpu: Gpu) -> int:
    """Programs of a launch that keep every multiprocessor busy: two each, so that one computes while one loads."""
    return 2 * gpu.multiprocessors
