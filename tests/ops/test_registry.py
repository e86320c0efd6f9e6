"""The registry: complete test cases, and the helpers that every operator shares."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from tests.ops.cases import CASES
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype
from tinysr_kernels.ops.registry import register

HERE = Path(__file__).parent


def test_every_operator_has_cases() -> None:
    assert set(CASES) == set(REGISTRY)
    assert all(len(cases) >= 3 for cases in CASES.values())
    assert all(len({str(case) for case in cases}) == len(cases) for cases in CASES.values())


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_operator_has_its_tests(name: str) -> None:
    """One stem per operation: the module that defines it, and the test file that holds its contract."""
    module = inspect.getmodule(REGISTRY[name].reference)
    assert module is not None
    stem = module.__name__.rsplit(".", 1)[1]
    assert f'op = "{name}"' in next(HERE.rglob(f"test_{stem}.py")).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_signatures_agree(name: str) -> None:
    """Reference and cost take what the schema says, under the same names, in the same order, with its defaults."""
    entry = REGISTRY[name]
    schema = entry.overload._schema
    declared = [a.name for a in schema.arguments]
    for function in (entry.reference, entry.cost):
        parameters = inspect.signature(function).parameters
        assert list(parameters) == declared
        for argument in schema.arguments:
            default = parameters[argument.name].default
            assert (default is inspect.Parameter.empty) == (not argument.has_default_value())
            assert default is inspect.Parameter.empty or default == argument.default_value
    assert str(schema.arguments[0].type) == "Tensor"


def test_a_new_operator_without_cases_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "new", REGISTRY["linear"])
    with pytest.raises(AssertionError):
        test_every_operator_has_cases()


def test_a_name_is_registered_once() -> None:
    with pytest.raises(RuntimeError, match="layer_norm"):
        register("layer_norm(Tensor x, float eps) -> Tensor", lambda: None, lambda: None, lambda: None)


def test_size_counts_memory_once() -> None:
    x = torch.empty(2, 3, 5, dtype=torch.float16)
    assert nbytes(x) == 60
    assert nbytes(x, None, x) == 60
    assert nbytes(x, x.clone()) == 120
    assert nbytes(x[:, :, :1].expand(2, 3, 5)) == 12
    assert nbytes() == 0


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.uint8, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_wide(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert compute_dtype(dtype) == expected


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 4, 5), (2, 7, 1, 1), (1, 1, 1, 1), (3, 1, 1, 5), (0, 3, 2, 2)])
def test_nhwc_has_one_set_of_strides(shape: tuple[int, ...]) -> None:
    """Single channels and pixels included, where contiguity alone would leave the strides open."""
    x = torch.rand(shape)
    like = empty_nhwc(x, shape)
    for t in (x, x.contiguous(memory_format=torch.channels_last), x.expand(shape), like):
        assert nhwc(t).stride() == like.stride()
        assert t is like or torch.equal(nhwc(t), x)
    dense = nhwc(x)
    assert nhwc(dense) is dense


def test_plain_keeps_what_is_plain() -> None:
    x = torch.rand(3, 4)
    assert contiguous_as(x, torch.float32).data_ptr() == x.data_ptr()
    assert contiguous_as(x.T[:, :1].expand(4, 1), torch.float32).stride() == (1, 1)
    assert contiguous_as(x.T, torch.float64).is_contiguous()
