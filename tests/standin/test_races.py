"""No program depends on another one of its launch: operators in the interpreter, addresses tracked (`races.py`)."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.static.network_calls import CALLS
from tests import ROOT
from tests.ops.cases import CASES, Case, _conv3x3, norm_first
from tests.standin.races import judge
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.plan import Launch, Plan
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.conv.implicit_gemm import Config

SLOW = {"conv3x3_moments", "sepconv_moments", "sepconv_block", "upsample_conv_norm", "wavelet_fix"}
"""Left to `make long`, where every operator runs with all cases."""


def planned(case: Case, config: Any = None) -> Plan:
    """In half precision."""
    chosen = {} if config is None else {case.op: config}
    with configs.given(**chosen), torch.inference_mode():
        return REGISTRY[case.op](**case.arguments(torch.float16)).planned()[0]


@functools.cache
def configurations(op: str) -> list[Any]:
    """The configurations that the operator's own tests run, then the heuristic's, which is None."""
    found: dict[str, Any] = {}
    for path in sorted((ROOT / "tests" / "ops").rglob("test_*_kernel.py")):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for value in vars(module).values():
            contract = getattr(value, "contract", None)
            if isinstance(value, type) and contract is not None and contract.op == op:
                found |= value.configs
    return [*found.values(), None]


@pytest.mark.parametrize("op", sorted(set(CASES) - SLOW))
def test_programs_are_independent(op: str) -> None:
    with torch.inference_mode():
        assert judge(planned(CASES[op][0]), ("in order", "reversed")) == []


def test_a_norm_prologue_ends_with_its_channels() -> None:
    """Also where the reduction ends within a block that is longer than the channels: 9 x 16 of 3 x 64."""
    case = Case("conv3x3", "normed, 16 channels", norm_first(_conv3x3(1, 16, 8, 3, 4), 4))
    config = Config("tile", 16, 4, 16, 64, 1, 4, 1)
    plan = planned(case, config)
    assert "conv" in {name.rpartition(".")[2] for name in kernels(plan)}
    with torch.inference_mode():
        assert judge(plan, ("in order",)) == []


@pytest.mark.long
@pytest.mark.parametrize("op", sorted(CASES))
def test_programs_of_every_case(op: str) -> None:
    for case, config in _every(op):
        try:
            plan = planned(case, config)
        except ValueError:  # a configuration of another form
            continue
        with torch.inference_mode():
            assert judge(plan, ("in order", "shuffled")) == [], (case, config)


def _every(op: str) -> Iterator[tuple[Case, Any]]:
    for config in configurations(op):
        for case in CASES[op] if config is None else CASES[op][:2]:
            yield case, config


@pytest.mark.long
def test_every_kernel_is_tracked() -> None:
    """Those that the networks launch, on any architecture, are among those that the cases launch."""
    tracked, launched = set(), set()
    for op in CASES:
        for case, config in _every(op):
            try:
                tracked |= kernels(planned(case, config))
            except ValueError:
                continue
    for op, calls in CALLS.items():
        for gpu in GPUS.values():
            for call in calls(torch.float16) if gpu.capability >= REGISTRY[op].capability else ():
                with assume(gpu):
                    launched |= kernels(call.planned()[0])
    assert launched - tracked == set()


def kernels(plan: Plan) -> set[str]:
    """Module and name of each kernel."""
    functions = [launch.kernel.function for launch in plan.launches if isinstance(launch, Launch)]
    return {f"{function.__module__}.{function.__name__}" for function in functions}
