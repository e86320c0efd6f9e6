"""Calls as data: they arrive as they were, and are told apart by what matters to their kernels."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from tests.first_use.test_correctness import norm_call, sepconv_call
from tests.ops.cases import CASES
from tinysr_kernels.first_use.items import from_data, item_of, items_of, to_data
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.ops import REGISTRY, Operator

H200 = GPUS[90]


def layout(value: object) -> object:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.storage_offset(), value.device.type
    return value


@pytest.mark.parametrize("op", list(REGISTRY))
def test_every_operator_arrives_as_it_was(op: str) -> None:
    for case in CASES[op]:
        call = REGISTRY[op](**case.arguments(torch.float16)).on_meta()
        arrived = from_data(json.loads(json.dumps(to_data(call), allow_nan=False)))
        assert type(arrived) is REGISTRY[op]
        assert {k: layout(v) for k, v in arrived.arguments.items()} == {k: layout(v) for k, v in call.arguments.items()}


def test_views_and_identities_arrive() -> None:
    call = sepconv_call()
    arrived = from_data(to_data(call))
    assert arrived.arguments["x"] is arrived.arguments["residual"]
    assert arrived.arguments["x"] is not arrived.arguments["pointwise"]
    whole = torch.empty(4, 50, dtype=torch.float16, device="meta")
    sliced = REGISTRY["layer_norm"](whole[1:, 8:48], 1e-6)
    assert layout(from_data(to_data(sliced)).first) == layout(sliced.first)


def key(call: Operator, arch: int = 90) -> str:
    return item_of(call, GPUS[arch]).key


def test_the_key_depends_on_shapes_dtypes_and_numbers() -> None:
    x = torch.empty(3, 40, dtype=torch.float16, device="meta")
    assert key(norm_call()) == key(norm_call())
    others = [
        norm_call(torch.bfloat16),
        REGISTRY["layer_norm"](x, 1e-5),
        REGISTRY["layer_norm"](x[:2], 1e-6),
        REGISTRY["layer_norm"](torch.empty(40, 3, dtype=torch.float16, device="meta").T, 1e-6),
    ]
    assert len({key(norm_call()), *map(key, others)}) == 5


def test_the_key_depends_on_the_configuration_and_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(norm_call())
    other = REGISTRY["layer_norm"].config(**dict.fromkeys(REGISTRY["layer_norm"].config.__dataclass_fields__, 1))
    with configs.given(layer_norm=other):
        assert key(norm_call()) != before
    with configs.given_pdl(True):
        assert key(norm_call()) != before
    monkeypatch.setattr("tinysr_kernels.first_use.items.hashes_of", lambda op: {"kernel_hash": "another"})
    assert key(norm_call()) != before


def test_items_are_the_distinct_calls_that_kernels_run() -> None:
    wide = REGISTRY["layer_norm"](torch.empty(3, 40, dtype=torch.float64, device="meta"), 1e-6)
    found = items_of([None, norm_call(), wide, sepconv_call(), norm_call()], H200)
    assert [item.op for item in found] == ["layer_norm", "sepconv"]
    assert found[0].variant == norm_call().bucket()


def test_operators_that_this_gpu_has_no_kernels_for_are_left_out() -> None:
    """As e4m3 before compute capability 8.9."""
    op = "quantize_rows"
    call = REGISTRY[op](**CASES[op][0].arguments(torch.float16)).on_meta()
    assert [item.op for item in items_of([call], H200)] == [op]
    assert items_of([call], GPUS[80]) == []
