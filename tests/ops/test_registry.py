"""The registry: complete test cases, and the helpers that every operator shares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.ops.cases import CASES
from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.ops.call import register, schema
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype

HERE = Path(__file__).parent


def test_every_operator_has_cases() -> None:
    assert set(CASES) == set(REGISTRY)
    assert all(len(cases) >= 3 for cases in CASES.values())
    assert all(len({str(case) for case in cases}) == len(cases) for cases in CASES.values())


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_operator_has_its_tests(name: str) -> None:
    """One stem per operator: the module of its class, or of its mixin, and the test file that holds its contract."""
    stems = [base.__module__.rsplit(".", 1)[1] for base in REGISTRY[name].__mro__ if issubclass(base, Operator)]
    texts = [path.read_text(encoding="utf-8") for stem in stems for path in HERE.rglob(f"test_{stem}.py")]
    assert any(f'op = "{name}"' in text for text in texts)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_the_schema_is_the_fields(name: str) -> None:
    """Names, order, defaults, and which arguments are keywords; the first is a tensor."""
    fields = dataclasses.fields(REGISTRY[name])  # type: ignore[arg-type]
    arguments = REGISTRY[name].overload()._schema.arguments
    assert [a.name for a in arguments] == [f.name for f in sorted(fields, key=lambda f: f.kw_only)]
    for argument in arguments:
        (field,) = (f for f in fields if f.name == argument.name)
        assert argument.kwarg_only == field.kw_only
        assert argument.has_default_value() == (field.default is not dataclasses.MISSING)
        assert not argument.has_default_value() or argument.default_value == field.default
    assert str(arguments[0].type) == "Tensor"
    assert set(REGISTRY[name].tuned_by) <= {f.name for f in fields}


def test_schemas_of_every_type() -> None:
    @dataclass(slots=True, eq=False)
    class Some(Operator):
        name = "some"
        x: Tensor
        y: Tensor | None
        dtype: torch.dtype
        n: int = 3
        eps: float = 1e-6
        flag: bool = False
        word: str = "none"
        out: torch.dtype | None = None
        keyword: Tensor | None = field(default=None, kw_only=True)

    class SomeMoments(Some):
        __slots__ = ()
        name = "some_moments"
        returns = "(Tensor, Tensor)"

    arguments = (
        'Tensor x, Tensor? y, ScalarType dtype, int n=3, float eps=1e-06, bool flag=False, str word="none", '
        "ScalarType? out=None, *, Tensor? keyword=None"
    )
    assert schema(Some) == f"some({arguments}) -> Tensor"
    assert schema(SomeMoments) == f"some_moments({arguments}) -> (Tensor, Tensor)"
    torch._C.parse_schema(f"tests::{schema(SomeMoments)}")


def test_a_new_operator_without_cases_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY, "new", REGISTRY["linear"])
    with pytest.raises(AssertionError):
        test_every_operator_has_cases()


def test_a_name_is_registered_once() -> None:
    with pytest.raises(RuntimeError, match="layer_norm"):
        register(REGISTRY["layer_norm"])


def test_nbytes_counts_memory_once() -> None:
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
def test_compute_dtype(dtype: torch.dtype, expected: torch.dtype) -> None:
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


def test_contiguous_tensors_are_not_copied() -> None:
    x = torch.rand(3, 4)
    assert contiguous_as(x, torch.float32).data_ptr() == x.data_ptr()
    assert contiguous_as(x.T[:, :1].expand(4, 1), torch.float32).stride() == (1, 1)
    assert contiguous_as(x.T, torch.float64).is_contiguous()
