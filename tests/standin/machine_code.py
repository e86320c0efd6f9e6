"""Launches whose machine code is read: one of each kernel, and those that need a barrier."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.static.machine_code import Variant, variant
from benchmarks.static.network_calls import CALLS
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import REGISTRY

MERGE = "merge_splits_norm"
"""The kernel whose threads read again what other threads of their block have stored."""


def launches(arch: int, ops: tuple[str, ...], dtype: torch.dtype) -> Iterator[Launch]:
    """Of all calls of the networks."""
    for op in ops:
        if GPUS[arch].capability >= REGISTRY[op].capability:
            for call in CALLS[op](dtype):
                with assume(GPUS[arch]):
                    plan, _ = call.planned()
                yield from (launch for launch in plan.launches if isinstance(launch, Launch))


def one_of_each(arch: int) -> dict[str, Variant]:
    """A variant of each kernel."""
    found: dict[str, Variant] = {}
    for launch in launches(arch, tuple(CALLS), torch.float16):
        found.setdefault(
            f"{launch.kernel.function.__module__}.{launch.kernel.function.__name__}", variant(arch, launch)
        )
    return found


def merges(arch: int) -> list[Variant]:
    """A variant of MERGE that reads again, if there is one."""
    for launch in launches(arch, ("conv3x3_norm", "upsample_conv_norm"), torch.bfloat16):
        if launch.kernel.function.__name__ == MERGE and launch.arguments["WHOLE"] is False:
            return [variant(arch, launch)]
    return []
