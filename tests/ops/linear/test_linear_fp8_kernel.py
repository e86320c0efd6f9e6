"""The kernel of linear_fp8 and linear_fp8_quantized on every case of both, and what products it compiles to."""

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
from tinysr_kernels.ops.linear.linear_fp8 import Config, heuristic

# Small blocks, so that these small products have several of each kind and ragged ends.
CONFIGS = {
    "small": Config(16, 16, 32, 2, 4, 1),
    "long slices": Config(16, 32, 128, 2, 4, 1),
}
MUTATIONS = {
    "first slice alone": ("for start in range(0, depth, SLICE):", "for start in range(0, SLICE, SLICE):"),
    "last slice alone": ("acc += sums * scale", "acc = sums * scale"),
    "behind the depth": ("known = k < depth - start", "known = k < depth - start + 1"),
    "the first row for all": ("last[:, None] * depth", "(last * 0)[:, None] * depth"),
    "the first row's scale": ("first_row * groups + last * groups", "first_row * groups"),
    "the first group's scale": ("at_scale + start // GROUP", "at_scale + start * 0"),
    "no scale of the channel": ("v = acc * tl.load(weight_scale", "v = acc + 0.0 * tl.load(weight_scale"),
    "no bias": ("v += tl.load(bias", "v += 0.0 * tl.load(bias"),
    "no activation": ("v = gelu_tanh(v)", "v = v * 1.0"),
    "rows of the band mixed up": ("(first + inside % height)", "(first + inside * 0)"),
    "blocks of features mixed up": ("column = block * COLUMNS", "column = block * 8"),
}


class Fp8Kernels(KernelContract):
    kernels = linear_fp8_kernel
    configs: ClassVar = CONFIGS


class TestLinearFp8Kernels(Fp8Kernels):
    contract = test_linear_fp8.TestLinearFp8
    mutations: ClassVar = MUTATIONS | {
        "no residual": ("if residual is not None:", "if residual is not None and features < 0:")
    }


class TestLinearFp8QuantizedKernels(Fp8Kernels):
    contract = test_linear_fp8.TestLinearFp8Quantized
    mutations: ClassVar = MUTATIONS | {
        "scale of another group": ("* across + block, tl.div_rn", "* across + across - 1 - block, tl.div_rn"),
        "largest of signed values": ("tl.max(tl.abs(v), 1)", "tl.max(v, 1)"),
        "scale of another row": ("(first_row + row) * across + block", "(rows - 1 - first_row - row) * across + block"),
    }


def test_a_result_in_float64_goes_to_the_reference() -> None:
    """However the scales come."""
    arguments = CASES["linear_fp8"][0].arguments(torch.float32) | {"dtype": torch.float64}
    with using("triton"):
        found = REGISTRY["linear_fp8"].overload(**arguments)
    assert found.dtype == torch.float64
    assert torch.equal(found, REGISTRY["linear_fp8"].reference(**arguments))


def test_slices_end_with_groups() -> None:
    """A group that the configuration's slice does not divide shortens it."""
    with assume(GPUS[90]):
        for case, expected in zip(CASES["linear_fp8"], (128, 64, 128, 128, 32), strict=False):
            (launch,) = REGISTRY["linear_fp8"].plan(**case.arguments(torch.float16))[0].launches
            assert launch.arguments["SLICE"] == expected, case


@pytest.mark.parametrize("arch", [89, 90, 100, 120])
def test_ragged_shapes_take_the_tile_that_leaves_registers(arch: int) -> None:
    """Larger ones spill some with masks and unaligned rows; whole slices and features of 16 take the larger ones."""
    columns = []
    for features, depth in ((1536, 1536), (1000, 1536), (1536, 96)):
        x, weight = (torch.empty(n, depth, dtype=torch.float8_e4m3fn, device="meta") for n in (1024, features))
        columns.append(heuristic(GPUS[arch], x, weight).columns)
    assert columns == [128, 64, 64]


@pytest.mark.parametrize(("arch", "instruction"), [(89, "QMMA"), (90, "QGMMA")])
def test_sums_leave_the_tensor_cores_after_each_slice(arch: int, instruction: str) -> None:
    """fp8 products, and between them a multiply-add for each element that a thread has: the scale, in float32.

    Without bias and activation there is no other use of them. They would be missing if the compiler had let the tensor
    cores add to the sums of the slice before.
    """
    pytest.importorskip("triton.backends.nvidia", reason="the compiler's own tools are needed")
    x, weight = (torch.empty(*s, dtype=torch.float8_e4m3fn, device="meta") for s in ((1, 1024, 1536), (1536, 1536)))
    scales = torch.empty(1, 1024, 1, device="meta"), torch.empty(1536, device="meta")
    with assume(GPUS[arch]):
        plan, choice = REGISTRY["linear_fp8"].plan(x, scales[0], weight, scales[1], torch.float16)
    config = choice.config
    variant = machine_code.variant(arch, plan.launches[0])
    (text,) = machine_code.compile_all([variant], 1, function=machine_code.listing)
    assert re.search(rf"\b{instruction}\b", text)
    assert not re.search(r"\b(?:STL|LDL)\b", text)
    assert len(re.findall(r"\bFFMA\b", text)) >= config.rows * config.columns // (32 * config.warps)
