"""linear's kernel with one and two blocks of features, and the cuBLASLt backend, on every case of the operator."""

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


def where_possible(op: str, config: Config) -> dict[str, Config]:
    """The configuration by bucket, for the cases that split-K serves."""
    calls = [REGISTRY[op](**case.arguments(torch.float16)) for case in CASES[op]]
    return {call.bucket(): config for call in calls if call.can_split}


class TestLinearKernels(KernelContract):
    contract = test_linear.TestLinear
    kernels = linear_kernel
    # Small blocks, so that these small matmuls have several of each kind and ragged ends.
    configs: ClassVar = {
        "two blocks": Config("tile", 16, 16, block_n2=16, block_k=32, group_m=2, num_warps=4, num_stages=1),
        "split-K": where_possible("linear", Config("tile", 16, 32, 16, 16, 2, 4, 1, split_k=3)),
        "library": LIBRARY,
    }
    mutations: ClassVar = {
        "first step alone": ("for start in range(0, K, BLOCK_K):", "for start in range(0, BLOCK_K, BLOCK_K):"),
        "beyond K": ("k_mask = k < K - start", "k_mask = k < K - start + 1"),
        "the first row for all": ("x_ptrs = x + rows[:, None] * stride", "x_ptrs = x + (rows * 0)[:, None] * stride"),
        "no second input": ("if x2 is not None:", "if x2 is not None and K < 0:"),
        "exact GELU for tanh": ("v = gelu_tanh(v)", "v = _gelu(v * 1.02)"),
        "gates are values": ("acc *= _gelu(acc2)", "acc = acc2 * _gelu(acc)"),
        "one bias for both": ("_vector(bias + N,", "_vector(bias,"),
        "gates from the first half": ("w_rows2 += N", "w_rows2 += 0"),
        "no bias": ("v += _vector(bias", "v += 0.0 * _vector(bias"),
        "no gate": ("v *= _vector(gate", "v += 0.0 * _vector(gate"),
        "no residual": ("if residual is not None:", "if residual is not None and N < 0:"),
        "second block lost": (
            "        if SECOND:\n            first_col += BLOCK_N",
            "        if SECOND and M < 0:\n            first_col += BLOCK_N",
        ),
        "rows of a group mixed up": ("(first_block + in_group % group_m)", "(first_block + in_group * 0)"),
        "blocks of features mixed up": (
            "BLOCK_M, in_group // group_m * WIDTH",
            "BLOCK_M, in_group // group_m * (WIDTH // 2)",
        ),
        "the first part of K for all": ("begin = tl.program_id(1) * k_per_split", "begin = tl.program_id(1) * 0"),
        "the last part of K as long as all": ("tl.minimum(k_per_split, K - begin)", "k_per_split"),
        "one part of K twice": ("M.to(tl.int64) * split + first_row", "first_row"),
        "no mean": ("rstd[:, None] * (acc - mean[:, None] *", "rstd[:, None] * (acc - 0.0 * mean[:, None] *"),
        "no rstd": ("return rstd[:, None] * (acc", "return (acc"),
        "the values' sums for the gates": ("weight_sums + N, cols2", "weight_sums, cols2"),
        "second block not normalized": (
            "elif SECOND:\n            acc2 = _norm",
            "elif SECOND:\n            _ = _norm",
        ),
        "parts count alike": ("tl.minimum(K - part * PART, PART)", "(part * 0 + PART)"),
        "means of parts alike": ("squares + count * deviation * deviation", "squares"),
        "no eps": ("tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance)"),
        "the first part alone": ("(part < PARTS)[None, :]", "(part < 1)[None, :]"),
        "the first block of parts for all": ("tl.load(at + start, mask", "tl.load(at, mask"),
    }


class TestLinearRowMomentsKernels(KernelContract):
    contract = test_linear.TestLinearRowMoments
    kernels = linear_kernel
    configs: ClassVar = {
        "two blocks": Config("tile", 16, 32, block_n2=32, block_k=32, group_m=2, num_warps=4, num_stages=1),
        "split-K": where_possible("linear_row_moments", Config("tile", 16, 64, 0, 16, 2, 4, 1, split_k=2)),
        "several parts": Config("tile", 32, 64, block_n2=64, block_k=16, group_m=4, num_warps=4, num_stages=2),
        "library": LIBRARY,
    }
    mutations: ClassVar = {
        "features beyond the end": ("mask = cols < N\n", "mask = cols < N + 1\n"),
        "parts of one size": ("tl.minimum(N - part * PART, PART)", "(part * 0 + PART)"),
        "mean not taken off": ("values - mean[:, :, None]", "values"),
        "parts of the first tile": ("part = first_col // PART + ", "part = "),
        "rows of the first tile": ("out_moments + first_row * (2 * parts) +", "out_moments +"),
    }


class TestRowMomentsOfStoredResults(KernelContract):
    """After a library's kernel one more launch computes the statistics."""

    contract = test_linear.TestLinearRowMoments
    kernels = row_moments_kernel
    configs: ClassVar = {"library": LIBRARY}
    mutations: ClassVar = {
        "the first block for all": ("first_col = tl.program_id(1) * BLOCK_N", "first_col = tl.program_id(1) * 0"),
        "the first rows for all": ("at = out + first_row * N +", "at = out +"),
    }


def test_row_moments_need_tiles_of_whole_parts() -> None:
    """A narrower tile is refused, not computed wrongly."""
    arguments = CASES["linear_row_moments"][0].arguments(torch.float16)
    narrow = Config("tile", 16, 16, block_n2=0, block_k=32, group_m=2, num_warps=4, num_stages=1)
    with (
        configs.given(linear_row_moments=narrow),
        pytest.raises(ValueError, match="blocks of whole 32 features"),
    ):
        REGISTRY["linear_row_moments"](**arguments).planned()


def test_gelu_as_exact_as_the_library() -> None:
    """Over the whole range, including the tails, where a sigmoid may overflow."""
    x = torch.linspace(-60, 60, 481)[:, None]
    arguments = {**CASES["linear"][5].arguments(torch.float32), "x": x, "weight": torch.ones(1, 1), "bias": None}
    for activation in ("gelu_tanh", "geglu"):
        weight = torch.ones(2 if activation == "geglu" else 1, 1)
        found = TestLinearKernels().call({**arguments, "weight": weight, "activation": activation})
        exact = test_linear.oracle(x.double(), weight.double(), activation=activation)
        assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-6), activation
