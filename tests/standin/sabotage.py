"""The code broken in ways that only a GPU would show, and what the checks of this folder say of it.

`python -m tests.standin.sabotage NAME` prints the faults found, as JSON. In a process of its own, where kernels are
compiled; what the interpreter or plain Python shows is broken in `test_sabotage.py`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.static import machine_code
from benchmarks.static.machine_code import sass, variant
from tests.ops.kernel_contract import mutated
from tests.standin import sizes
from tests.standin.failures import propagates
from tests.standin.machine_code import MERGE, launches, merges
from tests.standin.sass import barrier_before_reloading, instructions, waits_first
from tinysr_kernels.launch import guard
from tinysr_kernels.launch.kernel import jit, tl
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops.conv.kernels import conv_norm
from tinysr_kernels.ops.image.kernels import tanh_scaled

ARCH = 90
DIT = ("tinysr-dit", "separable")
DEMO = ("tinysr-unet", "demo")


@jit
def takes_an_integer_for_a_tensor(z, out, gain, numel, BLOCK_SIZE: tl.constexpr):
    """An integer of one is a constant to Triton, and has no `.to`."""
    at = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    mask = at < tl.num_programs(0) * numel.to(tl.int32)
    tl.store(out + at, tl.load(z + at, mask=mask) * gain, mask=mask)


def integer_of_one() -> list[str]:
    """A method of tensors called on an integer argument, which is 1 in some launches."""

    def run(self: Launch, pdl: bool = False) -> None:
        arguments = dict(self.arguments)
        if "numel" in arguments:
            arguments["numel"] = 1
        self.kernel.made[self.grid](**arguments, **self.options(pdl))

    wrong = mock.patch.object(tanh_scaled, "scale", takes_an_integer_for_a_tensor)
    with wrong, mock.patch.object(Launch, "run", run):
        return sizes.run(*DIT, [(32, 32)], "ttir").faults


def no_wait() -> list[str]:
    """A kernel that may start before what it reads is written."""
    with _replaced(tanh_scaled, "scale", "    await_inputs()\n", "    pass\n"):
        code = sass(variant(ARCH, next(launches(ARCH, ("tanh_scaled",), torch.float16))))
    return [] if waits_first(instructions(code)) else ["accesses memory before it waits"]


def no_barrier() -> list[str]:
    """Threads read what other threads of their block may not have stored yet."""
    with _replaced(conv_norm, MERGE, "        tl.debug_barrier()\n", "        pass\n"):
        code = sass(merges(ARCH)[0])
    return [] if barrier_before_reloading(instructions(code)) else ["no barrier before reloading"]


def guarded_out_of_memory() -> list[str]:
    """The launch guard takes a lack of memory for a faulty kernel."""
    with mock.patch.object(guard, "judge", return_value=(False, "no remedy")):
        return [] if propagates("out of memory") else ["out of memory was swallowed"]


def storm() -> list[str]:
    """A kernel for every image size: here pipeline stages that follow from the size."""
    options = Launch.options

    def by_size(self: Launch, pdl: bool = False) -> dict[str, object]:
        return options(self, pdl) | {"num_stages": 1 + self.grid[0] % 7}

    with mock.patch.object(Launch, "options", by_size):
        seen = sizes.run(*DEMO, sizes.SMALL + sizes.ORDINARY, "signature")
    return sizes.too_many(DEMO[0], seen)


def other_than_predicted() -> list[str]:
    """The static check compiles pointers to flags as another type than a launch does."""
    with mock.patch.dict(machine_code.POINTERS, {torch.bool: "*i1"}):
        return sizes.run(*DEMO, [(8, 8)], "signature").faults


def grid_that_does_not_exist() -> list[str]:
    """Launches that do not look at their grid, of more rows than a GPU takes on that axis."""

    def beyond(self: Launch, pdl: bool = False) -> None:
        self.kernel.made[(1, 1 << 16)](**self.arguments, **self.options(pdl))

    with mock.patch.object(Launch, "run", beyond):
        return sizes.run(*DEMO, [(8, 8)], "signature").faults


@contextlib.contextmanager
def _replaced(module: Any, kernel: str, old: str, new: str) -> Iterator[None]:
    """A kernel of the module whose source, or that of what it calls, reads `new` instead of `old`."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wrong = stack.enter_context(mutated(module, old, new, folder))
        stack.enter_context(mock.patch.object(module, kernel, getattr(wrong, kernel)))
        yield


SABOTAGES: dict[str, Callable[[], list[str]]] = {
    function.__name__: function
    for function in (
        integer_of_one,
        no_wait,
        no_barrier,
        guarded_out_of_memory,
        storm,
        other_than_predicted,
        grid_that_does_not_exist,
    )
}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(SABOTAGES[sys.argv[1]]()) + "\n")
