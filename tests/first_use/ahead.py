"""Compile a few kernels ahead, launch them on a stand-in for Triton's driver, and print what that took, as JSON.

`python -m tests.first_use.ahead [broken]`; broken: the workers end at once.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any
from unittest import mock

import torch

from tests.standin.driver import Driver, standing_in
from tests.standin.failures import noticed
from tinysr_kernels.first_use import compile_ahead
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.call import Operator

META = torch.device("meta")
ARCH = 90


def calls() -> list[Operator]:
    """Of three distinct kernels; the second call differs from the first in nothing that is compiled."""

    def images(dtype: torch.dtype, width: int = 16, offset: int = 0) -> torch.Tensor:
        strides = (16 * 16 * width, 1, 16 * width, 16)
        room = torch.empty(16 * 16 * width + offset, dtype=dtype, device="meta")
        return room.as_strided((1, 16, 16, width), strides, offset)

    half, single = torch.float16, torch.float32
    # The address of the last is no multiple of 16 bytes, so its kernel is another.
    tensors = (images(half), images(half, width=32), images(single), images(half, offset=1))
    return [REGISTRY["tanh_scaled"](z, 3.0) for z in tensors]


def main() -> None:
    """Twice ahead, then launched."""
    import triton

    hits: list[bool] = []
    found: dict[str, Any] = {}
    with (
        assume(GPUS[ARCH]),
        noticed() as notices,
        standing_in(Driver(ARCH)) as driver,
        mock.patch.object(compile_ahead, "FEW", 0),
        mock.patch.object(
            compile_ahead, "WORKER", "tests.first_use.no_such_module" if sys.argv[1:] else compile_ahead.WORKER
        ),
    ):
        for when in ("first", "again"):
            one = compile_ahead.compile_launches(compile_ahead.launches_of(calls(), META))
            found[when] = [one.planned, one.compiled]
        triton.knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
        for call in calls():
            call.compute()
        found |= {"notices": notices, "hits": hits, "launches": len(driver.launches)}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    logging.basicConfig()
    main()
