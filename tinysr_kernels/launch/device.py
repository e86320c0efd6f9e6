"""What a launch configuration depends on of the GPU that a tensor lies on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysr_kernels.launch import hardware

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
        """Bytes of shared memory per block at most."""
        return hardware.block_shared_bytes(self.arch)


# One card for each architecture that kernels are compiled for ahead of time.
GPUS = {
    card.arch: Gpu(card.name, card.capability, card.multiprocessors)
    for card in map(hardware.card, hardware.COMPILED_FOR)
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


@functools.cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether libraries compute in bfloat16 on the device; where not, cuDNN refuses it and cuBLAS emulates it.

    NVIDIA's GPUs do from compute capability 8.0 on.
    """
    nvidia = device.type == "cuda" and torch.version.hip is None
    return not nvidia or torch.cuda.get_device_capability(device) >= (8, 0)
