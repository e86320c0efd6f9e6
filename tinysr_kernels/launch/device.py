"""What a launch configuration depends on of the GPU that a tensor lies on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

MINIMUM_CAPABILITY = (8, 0)
"""Below it Triton has no tensor-core products: it compiles `tl.dot` to scalar multiply-adds."""


@dataclass(frozen=True)
class Gpu:
    """One model of GPU: its exact name, compute capability and streaming multiprocessors."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int

    @property
    def arch(self) -> int:
        """The compute capability as one number, such as 90."""
        return 10 * self.capability[0] + self.capability[1]

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that one program may have (CUDA programming guide, table of compute capabilities)."""
        return 1024 * SHARED_KIB.get(self.arch, 99)


SHARED_KIB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}

# One card for each architecture that kernels are compiled for ahead of time.
GPUS = {
    gpu.arch: gpu
    for gpu in (
        Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108),
        Gpu("NVIDIA GeForce RTX 3090", (8, 6), 82),
        Gpu("NVIDIA GeForce RTX 4090", (8, 9), 128),
        Gpu("NVIDIA H200", (9, 0), 132),
        Gpu("NVIDIA B200", (10, 0), 148),
        Gpu("NVIDIA GeForce RTX 5090", (12, 0), 170),
    )
}

_assumed: ContextVar[Gpu] = ContextVar("assumed", default=GPUS[90])


@contextlib.contextmanager
def assume(gpu: Gpu) -> Iterator[None]:
    """Plan launches for this GPU while tensors lie on no GPU (meta tensors, the interpreter)."""
    token = _assumed.set(gpu)
    try:
        yield
    finally:
        _assumed.reset(token)


def gpu_of(t: Tensor) -> Gpu:
    """The GPU that t lies on, or the one assumed for tensors that lie on none."""
    return gpu_at(t.device)


def gpu_at(device: torch.device) -> Gpu:
    """The GPU of a device, or the one assumed where the device is none."""
    return _properties(device) if device.type == "cuda" else _assumed.get()


@functools.cache
def _properties(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.name, (found.major, found.minor), found.multi_processor_count)
