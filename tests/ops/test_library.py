"""The library forms of all operators: within the references' bounds, without their float32 copies, as graphs need them."""

from __future__ import annotations

import copy
import functools
import importlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.static.network_calls import CALLS
from tests.ops.bounds import tensors
from tests.ops.cases import CASES, Case
from tests.ops.contract import FLOATS, OperatorContract, relaid
from tinysr_kernels.launch import device
from tinysr_kernels.launch.backend import using
from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.ops.norm.channel_moments import channel_moments_of, library_moments_of

HERE = Path(__file__).parent


@functools.cache
def contracts() -> dict[str, type[OperatorContract]]:
    """The class that tests each operator's reference, by the operator's name."""
    found = {}
    for path in sorted(HERE.glob("*/test_*.py")):
        if not path.stem.endswith("_kernel"):
            module = importlib.import_module(f"tests.ops.{path.parent.name}.{path.stem}")
            classes = (v for v in vars(module).values() if isinstance(v, type) and issubclass(v, OperatorContract))
            found |= {one.op: one for one in classes if hasattr(one, "op")}
    return found


def has_library_form(op: type[Operator]) -> bool:
    """Whether the class or a base of it, other than Operator, has one."""
    return op.library is not Operator.library


OPERATORS = sorted(name for name, op in REGISTRY.items() if has_library_form(op))
ALL_CASES = [pytest.param(case, id=f"{op}-{case}") for op in OPERATORS for case in CASES[op]]


def test_who_has_one() -> None:
    """Where networks spend their time; what is small, and the last steps to the image, is left to the reference."""
    small = {
        "adain_fix", "clamp_image", "wavelet_fix", "resize_bicubic", "tanh_scaled", "quantize_rows",
        "layer_norm_quantize",
    }  # fmt: skip
    assert set(REGISTRY) - set(OPERATORS) == small


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", ALL_CASES)
def test_as_good_as_eager(case: Case, dtype: torch.dtype) -> None:
    """Within the bound of tests/ops/bounds.py, in the form that the fake implementation promises."""
    contract = contracts()[case.op]()
    contract.check_as_good_as_eager(lambda **a: REGISTRY[case.op](**a).library(), case, dtype)
    call = REGISTRY[case.op](**case.arguments(dtype))
    kept = copy.deepcopy(call.arguments)
    for got, want in zip(tensors(call.library()), tensors(call.empty()), strict=True):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
    assert all(torch.equal(v, kept[k]) for k, v in call.arguments.items() if isinstance(v, Tensor))
