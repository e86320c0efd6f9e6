"""linear's kernel with one and two blocks of features, and the library, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from tests.ops.cases import CASES
from tests.ops.kernel_contract import KernelContract
from tests.ops.linear import test_linear
from tinysr_kernels.launch import configs
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.linear.linear import LIBRARY, Config
from tinysr_kernels.ops.norm.kernels import row_moments as row_moments_kernel


class TestLinearKernels(KernelContract):
    contract = test_linear.TestLinear
    kernels = linear_kernel
    # Small blocks, so that these small products have several of each kind and ragged ends.
    configs: ClassVar = {
        "two blocks": Config("tile", rows=16, columns=16, side=16, slice=32, band=2, warps=4, stages=1),
        "library": LIBRARY,
    }
    mutations: ClassVar = {
        "first slice alone": ("for start in range(0, depth, SLICE):", "for start in range(0, SLICE, SLICE):"),
        "behind the depth": ("known = k < depth - start", "known = k < depth - start + 1"),
        "the first row for all": ("at_x = x + row[:, None] * depth", "at_x = x + (row * 0)[:, None] * depth"),
        "no second input": ("if x2 is not None:", "if x2 is not None and depth < 0:"),
        "exact GELU for tanh": ("v = gelu_tanh(v)", "v = _gelu(v * 1.02)"),
        "gates are values": ("acc *= _gelu(side)", "acc = side * _gelu(acc)"),
        "one bias for both": ("_vector(bias + features,", "_vector(bias,"),
        "gates from the first half": ("side_taken += features", "side_taken += 0"),
        "no bias": ("v += _vector(bias", "v += 0.0 * _vector(bias"),
        "no gate": ("v *= _vector(gate", "v += 0.0 * _vector(gate"),
        "no residual": ("if residual is not None:", "if residual is not None and features < 0:"),
        "second block lost": (
            "        if SECOND:\n            begin += COLUMNS",
            "        if SECOND and rows < 0:\n            begin += COLUMNS",
        ),
        "rows of the band mixed up": ("(first + inside % height)", "(first + inside * 0)"),
        "blocks of features mixed up": ("begin = inside // height * WIDTH", "begin = inside // height * COLUMNS"),
        "no mean": ("rstd[:, None] * (v - mean[:, None] *", "rstd[:, None] * (v - 0.0 * mean[:, None] *"),
        "no rstd": ("return rstd[:, None] * (v", "return (v"),
        "the values' sums for the gates": ("weight_sums + features, side_column", "weight_sums, side_column"),
        "second block not normalised": (
            "elif SECOND:\n            side = _norm",
            "elif SECOND:\n            _ = _norm",
        ),
        "parts count alike": ("means * count, 0.0), 1) / depth", "means, 0.0), 1) / parts"),
        "means of parts alike": ("squares + count * deviation * deviation", "squares"),
        "no eps": ("tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance)"),
        "the first part alone": ("known = (number < parts)[None, :]", "known = (number < 1)[None, :]"),
    }


class TestLinearRowMomentsKernels(KernelContract):
    contract = test_linear.TestLinearRowMoments
    kernels = linear_kernel
    configs: ClassVar = {
        "two blocks": Config("tile", rows=16, columns=32, side=32, slice=32, band=2, warps=4, stages=1),
        "several parts": Config("tile", rows=32, columns=64, side=64, slice=16, band=4, warps=4, stages=2),
        "library": LIBRARY,
    }
    mutations: ClassVar = {
        "features behind the end": ("known = column < features\n", "known = column < features + 1\n"),
        "parts of one size": ("tl.minimum(features - number * PART, PART)", "(number * 0 + PART)"),
        "mean not taken off": ("values - mean[:, :, None]", "values"),
        "parts of the first tile": ("number = begin // PART + ", "number = "),
        "rows of the first tile": ("out_moments + first_row * (2 * parts) +", "out_moments +"),
    }


class TestRowMomentsOfStoredResults(KernelContract):
    """Where a library computes, one more launch takes the moments."""

    contract = test_linear.TestLinearRowMoments
    kernels = row_moments_kernel
    configs: ClassVar = {"library": LIBRARY}
    mutations: ClassVar = {
        "the first block for all": ("begin = tl.program_id(1) * COLUMNS", "begin = tl.program_id(1) * 0"),
        "the first rows for all": ("at = out + first_row * features +", "at = out +"),
    }


def test_row_moments_take_tiles_of_whole_parts() -> None:
    """A narrower tile is refused, not computed wrongly."""
    arguments = CASES["linear_row_moments"][0].arguments(torch.float16)
    narrow = Config("tile", rows=16, columns=16, side=0, slice=32, band=2, warps=4, stages=1)
    with (
        configs.given(linear_row_moments=narrow),
        pytest.raises(ValueError, match="blocks of whole 32 features"),
    ):
        REGISTRY["linear_row_moments"].plan(**arguments)


def test_gelu_as_exact_as_the_library() -> None:
    """Over the whole range, tails included, where a sigmoid may overflow."""
    x = torch.linspace(-60, 60, 481)[:, None]
    arguments = {**CASES["linear"][5].arguments(torch.float32), "x": x, "weight": torch.ones(1, 1), "bias": None}
    for activation in ("gelu_tanh", "geglu"):
        weight = torch.ones(2 if activation == "geglu" else 1, 1)
        found = TestLinearKernels().call({**arguments, "weight": weight, "activation": activation})
        exact = test_linear.oracle(x.double(), weight.double(), activation=activation)
        assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-6), activation
