"""tanh_scaled: the soft clamp at a decoder's entrance.

    out = tanh(gain * z)

Layouts: z [N,C,H,W], out likewise in channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops import device_functions
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check_rank
from tinysr_kernels.ops.image.kernels import tanh_scaled as tanh_scaled_kernel
from tinysr_kernels.ops.layout import empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import Implementation, register

SCHEMA = "tanh_scaled(Tensor z, float gain) -> Tensor"


def reference(z: Tensor, gain: float) -> Tensor:
    """Plain PyTorch, in float32 or wider.

    Any floating dtype; the result has z's. Raises ValueError unless z has four dimensions.
    """
    check_rank("z", z, "N,C,H,W")
    return nhwc(torch.tanh(nhwc(z).to(compute_dtype(z.dtype)) * gain).to(z.dtype))


def fake(z: Tensor, gain: float) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    check_rank("z", z, "N,C,H,W")
    return empty_nhwc(z, tuple(z.shape))


def cost(z: Tensor, gain: float) -> Cost:
    """FLOPs: 2 per element; bytes of z and the result once."""
    return Cost(2 * z.numel(), nbytes(z) + z.numel() * z.element_size())


@dataclass(frozen=True)
class Config:
    """A launch of tanh_scaled: numbers a program."""

    lanes: int
    warps: int


def bucket(z: Tensor, **_: Any) -> str:
    """Calls that share a configuration: dtype, numbers up to a power of two."""
    return f"{str(z.dtype).removeprefix('torch.')} {next_power_of_2(z.numel())}"


def heuristic(gpu: Gpu, z: Tensor, **_: Any) -> Config:
    """16 bytes a thread."""
    return Config(4096 // z.element_size() // 2, 4)


def plan(config: Config, z: Tensor, gain: float) -> Plan:
    """The launch; raises what the reference raises. What is not in channels_last is copied once."""
    out = fake(z, gain)
    arguments = {"z": nhwc(z), "out": out, "gain": float(gain), "numbers": z.numel(), "LANES": config.lanes}
    grid = (cdiv(z.numel(), config.lanes),)
    return Plan(out, (Launch(tanh_scaled_kernel.scale, grid, arguments, config.warps, 1),))


def space(gpu: Gpu, z: Tensor, **_: Any) -> Iterator[Config]:
    """More and fewer numbers a program."""
    for lanes, warps in itertools.product((256, 512, 1024, 2048), (2, 4, 8)):
        yield Config(lanes, warps)


KERNELS = Implementation(
    Config, bucket, heuristic, plan, space, (tanh_scaled_kernel.__name__, device_functions.__name__)
)

tanh_scaled = register(SCHEMA, reference, fake, cost, KERNELS)
