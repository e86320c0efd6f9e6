"""The kernel of quantize_rows and layer_norm_quantize on every case, and its rounding to e4m3, bit by bit."""

from __future__ import annotations

import re
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from benchmarks.static import machine_code
from tests.ops.cases import CASES
from tests.ops.kernel_contract import DEVICE, KernelContract
from tests.ops.linear import test_quantize
from tests.ops.linear.test_quantize import NUMBERS
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.linear.kernels import quantize as quantize_kernel
from tinysr_kernels.ops.linear.quantize import Config

CONFIGS = {"one row": Config(1, 1), "four rows": Config(4, 2)}
MUTATIONS = {
    "largest of signed values": ("tl.max(tl.abs(v), 1)", "tl.max(v, 1)"),
    "scale of another row": ("scale + rows,", "scale + M - 1 - rows,"),
    "half the range": ("tl.div_rn(448.0, top)", "tl.div_rn(224.0, top)"),
    "scale is its inverse": ("tl.div_rn(top, 448.0)", "tl.div_rn(448.0, top)"),
    "last feature lost": ("(cols < N)", "(cols < N - 1)"),
    "zeros have no scale": ("tl.maximum(tl.max(tl.abs(v), 1), smallest)", "tl.max(tl.abs(v), 1)"),
}


class TestQuantizeRowsKernels(KernelContract):
    contract = test_quantize.TestQuantizeRows
    kernels = quantize_kernel
    configs: ClassVar = CONFIGS
    mutations: ClassVar = MUTATIONS


class TestLayerNormQuantizeKernels(KernelContract):
    contract = test_quantize.TestLayerNormQuantize
    kernels = quantize_kernel
    configs: ClassVar = CONFIGS
    mutations: ClassVar = {
        "no norm": ("if NORMALIZE:", "if NORMALIZE and N < 0:"),
        "no eps": ("variance + eps", "variance"),
        "mean of the columns": ("tl.sum(v, 1)[:, None] / N", "tl.sum(v, 1)[:, None] / BLOCK_N"),
        "padding counts": ("tl.where(mask, v - mean, 0.0)", "v - mean"),
    }


def both(x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(q, scale) from the kernel and from the reference."""
    with using("triton"):
        q, scale = torch.ops.tinysr.quantize_rows(x.to(DEVICE))
    return (q.cpu(), scale.cpu()), REGISTRY["quantize_rows"](x).reference()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_bits_as_the_reference(dtype: torch.dtype) -> None:
    """Over all magnitudes, subnormal results and zeros included: a CPU emulates exactly what a GPU computes."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(40, 500, generator=generator) * torch.exp(3 * torch.randn(40, 500, generator=generator))
    for found, expected in zip(*both(spread.clamp(-6e4, 6e4).to(dtype)), strict=True):
        assert torch.equal(found, expected)


def test_every_number_and_every_tie() -> None:
    numbers = torch.tensor([*NUMBERS, *(-n for n in NUMBERS)])
    middles = (numbers[:126] + numbers[1:127]) / 2
    found, expected = both(torch.cat([numbers, middles, -middles]))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[0][: len(numbers)].float(), numbers)


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(broken: float) -> None:
    x = torch.ones(2, 64)
    x[1, 5] = broken
    (q, scale), _ = both(x)
    assert torch.isfinite(q.float() * scale).all(-1).tolist() == [True, False]


@pytest.mark.parametrize("arch", [89, 90])
def test_values_are_rounded_once(arch: int) -> None:
    """From float32 to e4m3 in one instruction; Triton's detour of float16 on sm_89 would get ties wrong."""
    pytest.importorskip("triton.backends.nvidia", reason="the compiler's own tools are needed")
    with assume(GPUS[arch]):
        x = torch.empty(64, 1536, dtype=torch.float16, device="meta")
        (launch,) = REGISTRY["quantize_rows"](x).planned()[0].launches
    variant = machine_code.variant(arch, launch)
    (text,) = machine_code.compile_all([variant], 1, function=machine_code.sass)
    assert set(re.findall(r"F2FP?\.[\w.]*E4M3[\w.]*", text)) == {"F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C"}


@pytest.mark.parametrize("op", ["quantize_rows", "layer_norm_quantize", "linear_fp8", "linear_fp8_quantized"])
def test_older_gpus_are_refused(op: str) -> None:
    """By name, and before anything is compiled."""
    arguments = CASES[op][0].arguments(torch.float16)
    for arch in (80, 86):
        with assume(GPUS[arch]), using("triton"), pytest.raises(ValueError, match=f"{op} needs .* 8.9, .* has 8.[06]"):
            REGISTRY[op].overload()(**arguments)
