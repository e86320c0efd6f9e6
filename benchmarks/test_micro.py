"""Operations as pytest-benchmark cases: `pytest benchmarks`, with its --benchmark-compare, --benchmark-json and so on.

One call of each operation: on a GPU the one of the released networks that must take longest, by its kernels and without
the host's part, as a CUDA graph; on a CPU the cheapest, by its reference. `python -m benchmarks micro` measures all
calls.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from benchmarks.commands.micro import Case, cases, runs
from benchmarks.measure.timing import captured
from tinysr_kernels.first_use.inputs import random_call
from tinysr_kernels.launch.backend import using
from tinysr_kernels.ops import REGISTRY

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", torch.cuda.current_device()) if CUDA else torch.device("cpu")
CALLS = 32


@functools.cache
def case_of(op: str) -> Case | None:
    """The call that stands for the operation; None where no released network calls it."""
    return next((case for case in cases(not CUDA) if case.op == op), None)


@pytest.mark.parametrize("op", sorted(REGISTRY))
@torch.inference_mode()
def test_operation(op: str, benchmark: Any) -> None:
    """Seconds of CALLS calls on a GPU, of one on a CPU."""
    case = case_of(op)
    if case is None:
        pytest.skip("no released network calls it")
    benchmark.extra_info.update(case.labels("ours"), calls=CALLS if CUDA else 1)
    with using("auto"):
        several = runs("ours", [random_call(case.call, DEVICE, seed) for seed in range(2)])
        assert several is not None
        if not CUDA:
            benchmark(several[0])
            return
        graph, _ = captured(several, CALLS)

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark(replay)
