"""Arguments of `compile` of another type, or out of range: an InputError by their name, whatever the object does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

import tinysr_kernels
from tests.fuzz.odd import OBJECTS
from tinysr_kernels.errors import InputError
from tinysr_kernels.runtime.arguments import check_types

GOOD: dict[str, Any] = {
    "device": None, "dtype": None, "backend": "auto", "quantize": None, "cuda_graphs": True, "color_fix": None,
    "upscale": 4, "tile": None, "max_graph_shapes": 8,
}  # fmt: skip
BAD: dict[str, tuple[Any, ...]] = {
    "device": ("", -1, 256, 10**30, True, False, 0.0, b"cpu", ["cpu"]),
    "dtype": ("", "float8", "torch.float16", "Float16", 16, int, torch.int8, torch.complex64, np.float16, ["float16"]),
    "backend": (None, "", "cuda", True, ["auto"]),
    "quantize": ("int4", "", True, False, ["fp8"], np.array(["fp8"])),
    "cuda_graphs": (None, 0, 1, "yes", np.bool_(True)),
    "color_fix": ("", "Adain", [], False, 0),
    "upscale": (None, 0, -4, 9, 10**400, 4.0, "4", True, math.nan, np.int64(4), torch.tensor(4)),
    "tile": (0, -1, 15, 1e9, 2**21, "64", True, False, [64]),
    "max_graph_shapes": (None, 0, -1, 2.5, 2**21, "8", True),
}


@pytest.mark.parametrize("name", GOOD)
def test_other_types_and_values_are_refused_by_name(name: str) -> None:
    check_types(**GOOD)
    odd = [made() for made in OBJECTS]
    for value in (*BAD[name], *(one for one in odd if one is not None and type(one) not in (bool, int, str))):
        with pytest.raises(InputError, match=name) as caught:
            check_types(**GOOD | {name: value})
        assert len(str(caught.value)) < 300
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "arguments",
    [
        {"device": "cuda:1"}, {"device": torch.device("cpu")}, {"device": 0}, {"dtype": "bfloat16"},
        {"dtype": torch.float64}, {"backend": "library"}, {"quantize": "fp8"}, {"cuda_graphs": False},
        {"color_fix": "none"}, {"upscale": 1}, {"upscale": 8}, {"tile": 16}, {"max_graph_shapes": 1},
    ],
    ids=str,
)  # fmt: skip
def test_documented_values_are_taken(arguments: dict[str, Any]) -> None:
    check_types(**GOOD | arguments)


def test_compile_asks_before_it_reads_anything() -> None:
    with pytest.raises(InputError, match="tile must be a whole number from 16"):
        tinysr_kernels.compile("no such checkpoint", tile=-1)
