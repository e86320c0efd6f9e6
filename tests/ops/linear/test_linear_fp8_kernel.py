"""The kernel of linear_fp8 and linear_fp8_quantized on every case of both, and the matmul instructions in its code."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch

from benchmarks.static import machine_code
from tests.ops.cases import CASES
from tests.ops.kernel_contract import KernelContract
from tests.ops.linear import test_linear_fp8
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.linear.kernels import linear_fp8 as linear_fp8_kernel
from tinysr_kernels.ops.linear.linear_fp8 import Config, LinearFp8

# Small blocks, so that these small matmuls have several of each kind and ragged ends.
CONFIGS = {
    "small": Config(block_m=16, block_n=16, block_k=32, group_m=2, num_warps=4, num_stages=1),
    "long steps": Config(block_m=16, block_n=32, block_k=128, group_m=2, num_warps=4, num_stages=1),
}
MUTATIONS = {
    "first step alone": ("for start in range(0, K, BLOCK_K):", "for start in range(0, BLOCK_K, BLOCK_K):"),
    "last step alone": ("acc += partial * scale", "acc = partial * scale"),
    "beyond K": ("k_mask = k < K - start", "k_mask = k < K - start + 1"),
    "the first row for all": ("x_rows[:, None] * K", "(x_rows * 0)[:, None] * K"),
    "the first row's scale": ("first_row * groups + x_rows * groups", "first_row * groups"),
    "the first group's scale": ("scale_ptrs + start // GROUP_K", "scale_ptrs + start * 0"),
    "no scale of the channel": ("v = acc * tl.load(weight_scale", "v = acc + 0.0 * tl.load(weight_scale"),
    "no bias": ("v += tl.load(bias", "v += 0.0 * tl.load(bias"),
    "no activation": ("v = gelu_tanh(v)", "v = v * 1.0"),
    "rows of a group mixed up": ("(first_block + in_group % group_m)", "(first_block + in_group * 0)"),
    "blocks of features mixed up": ("cols = block_n * BLOCK_N", "cols = block_n * 8"),
}


class Fp8Kernels(KernelContract):
    kernels = linear_fp8_kernel
    configs: ClassVar = CONFIGS


class TestLinearFp8Kernels(Fp8Kernels):
    contract = test_linear_fp8.TestLinearFp8
    mutations: ClassVar = MUTATIONS | {
        "no residual": ("if residual is not None:", "if residual is not None and N < 0:")
    }


class TestLinearFp8QuantizedKernels(Fp8Kernels):
    contract = test_linear_fp8.TestLinearFp8Quantized
    mutations: ClassVar = MUTATIONS | {
        "scale of another group": ("* blocks_n + block_n, tl.div_rn", "* blocks_n + blocks_n - 1 - block_n, tl.div_rn"),
        "largest of signed values": ("tl.max(tl.abs(v), 1)", "tl.max(v, 1)"),
        "scale of another row": ("(first_row + rows) * blocks_n", "(M - 1 - first_row - rows) * blocks_n"),
    }


def test_a_result_in_float64_goes_to_the_reference() -> None:
    """Whatever the dtype of the scales."""
    arguments = CASES["linear_fp8"][0].arguments(torch.float32) | {"dtype": torch.float64}
    with using("triton"):
        found = REGISTRY["linear_fp8"].overload()(**arguments)
    assert found.dtype == torch.float64
    assert torch.equal(found, REGISTRY["linear_fp8"](**arguments).reference())


def test_steps_end_with_groups() -> None:
    """A group that the configuration's block_k does not divide shortens it."""
    with assume(GPUS[90]):
        for case, expected in zip(CASES["linear_fp8"], (128, 64, 128, 128, 32), strict=False):
            (launch,) = REGISTRY["linear_fp8"](**case.arguments(torch.float16)).planned()[0].launches
            assert launch.arguments["BLOCK_K"] == expected, case


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_ragged_shapes_take_the_tile_that_leaves_registers(arch: int) -> None:
    """With masks and unaligned rows larger ones spill; even steps and multiples of 16 features take the larger ones."""
    block_n = []
    scale = torch.empty(1, device="meta")
    for features, depth in ((1536, 1536), (1000, 1536), (1536, 96)):
        x, weight = (torch.empty(n, depth, dtype=torch.float8_e4m3fn, device="meta") for n in (1024, features))
        call = LinearFp8(x, scale, weight, scale, torch.float16)
        block_n.append(call.heuristic(GPUS[arch]).block_n)
    assert block_n == [128, 64, 64]


@pytest.mark.parametrize(("arch", "instruction"), [(89, "QMMA"), (90, "QGMMA")])
def test_accumulators_leave_the_tensor_cores_after_each_step(arch: int, instruction: str) -> None:
    """fp8 matmul instructions, and between them one multiply-add per element and thread: the scale, in float32.

    Without bias and activation there is no other use of them. They would be missing if the compiler had let the tensor
    cores accumulate across steps.
    """
    pytest.importorskip("triton.backends.nvidia", reason="the compiler's own tools are needed")
    x, weight = (torch.empty(*s, dtype=torch.float8_e4m3fn, device="meta") for s in ((1, 1024, 1536), (1536, 1536)))
    scales = torch.empty(1, 1024, 1, device="meta"), torch.empty(1536, device="meta")
    with assume(GPUS[arch]):
        plan, choice = REGISTRY["linear_fp8"](x, scales[0], weight, scales[1], torch.float16).planned()
    config = choice.config
    variant = machine_code.variant(arch, plan.launches[0])
    (text,) = machine_code.compile_all([variant], 1, function=machine_code.sass)
    assert re.search(rf"\b{instruction}\b", text)
    assert not re.search(r"\b(?:STL|LDL)\b", text)
    assert len(re.findall(r"\bFFMA\b", text)) >= config.block_m * config.block_n // (32 * config.num_warps)
