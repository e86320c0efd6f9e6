"""Which configurations of a file can be launched: all that the tuner could have written, and nothing that could not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.launch.files import CALL, H200, MEASURED
from tests.ops.cases import CASES
from tinysr_kernels.launch import limits
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.conv.sepconv import Config


def calls(op: str) -> list[Any]:
    """Calls of an operator, on meta tensors."""
    made = [REGISTRY[op](**case.arguments(torch.float16)).on_meta() for case in CASES[op][:6]]
    return [call for call in made if call.kernels_apply]


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_the_whole_search_space_is_accepted(op: str) -> None:
    """And the heuristic's choice; unless the operator itself refuses it for the call."""
    for call in calls(op)[:2]:
        for gpu in (GPUS[80], GPUS[90]):
            if gpu.capability < call.capability:
                continue
            with assume(gpu):
                for config in {call.heuristic(gpu), *list(call.space(gpu))[::67]}:
                    assert limits.of_fields(vars(config)) == ""
                    obstacle = limits.of_call(call, config, gpu)
                    if obstacle:
                        with pytest.raises(ValueError):  # noqa: PT011  each operator has its own message
                            call.plan(config)


def odd(name: str, value: Any) -> list[Any]:
    if not isinstance(value, int) or isinstance(value, bool):
        return []
    return [v for v in (-1, -16, 3, 24, 1 << 17, 10**30) if v != value] + ([] if value == 0 else [1 << 15])


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_what_is_accepted_can_be_launched(op: str) -> None:
    """One field of the heuristic's choice after the other gets an odd value."""
    for call in calls(op)[:1]:
        if H200.capability < call.capability:
            continue
        config = call.heuristic(H200)
        for name, value in vars(config).items():
            for changed in odd(name, value):
                other = dataclasses.replace(config, **{name: changed})
                if limits.of_fields(vars(other)) or limits.of_call(call, other, H200):
                    continue
                with assume(H200):
                    launches = [one for one in call.plan(other).launches if isinstance(one, Launch)]
                # Only what counts parts or rows may be odd; three stages are usual.
                assert "block" not in name
                assert "num_warps" not in name
                assert "num_stages" not in name or changed == 3
                assert all(n >= 1 for launch in launches for n in launch.grid)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"block_m": -16}, "block_m must be from 0 to 65536, found -16"),
        ({"block_m": 24}, "block_m must be a power of two, found 24"),
        ({"num_warps": 3}, "num_warps must be a power of two, found 3"),
        ({"num_warps": 64}, "num_warps must be at most 32, found 64"),
        ({"num_stages": 9}, "num_stages must be at most 8, found 9"),
        ({"rows": 10**5000}, "rows must be from 0 to 65536, found one of 16610 bits"),
    ],
)
def test_fields(changes: dict[str, int], reason: str) -> None:
    assert limits.of_fields({**MEASURED, **changes}) == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"block_n": 128},
        {"block_m": 8},
        {"block_k": 0},
        {"num_stages": 0},
        {"num_stages": 4},
        {"num_warps": 2},
        {"num_warps": 0},
        {"rows": 40},
        {"form": "tiles"},
        {"form": ""},
    ],
    ids=str,
)
def test_what_is_outside_of_the_space(changes: dict[str, Any]) -> None:
    config = Config(**{**MEASURED, **changes})
    assert limits.of_call(CALL, Config(**MEASURED), H200) == ""
    assert limits.of_fields(vars(config)) == ""
    assert limits.of_call(CALL, config, H200) == "is outside of the search space"


def test_grids() -> None:
    """A tile narrower than the border of a convolution would have a negative number of them."""
    weight = torch.empty(3, 64, 3, 3, device="meta")
    call = REGISTRY["conv3x3"](torch.empty(1, 64, 64, 64, device="meta"), weight)
    config = dataclasses.replace(call.heuristic(H200), tile_width=1)
    assert config.form == "few"
    assert "has the grid" in limits.of_call(call, config, H200)
