"""The kernels of attention in each form, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from tests.ops.attention import test_attention
from tests.ops.cases import Case
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.launch.device import GPUS, Gpu
from tinysr_kernels.ops.attention.attention import Attention, Config, head_blocks
from tinysr_kernels.ops.attention.kernels import attention as attention_kernel


class TestAttentionKernels(KernelContract):
    contract = test_attention.TestAttention
    kernels = attention_kernel
    # Small blocks, so that few tokens have several of each kind and ragged ends.
    configs: ClassVar = {
        "wide, steps of block_k, split-K": Config(
            "wide",
            block_m=32,
            block_n=16,
            num_warps=4,
            num_stages=1,
            separate_tail=False,
            block_k=64,
            block_d=128,
            split_k=3,
        ),
        "wide, split-K": Config(
            "wide", block_m=32, block_n=32, num_warps=4, num_stages=2, block_k=256, block_d=256, split_k=2
        ),
        "flash": Config("flash", block_m=32, block_n=16, num_warps=4, num_stages=2),
        "flash, one loop": Config("flash", block_m=64, block_n=32, num_warps=4, num_stages=2, separate_tail=False),
        "library": Config("library"),
    }
    mutations: ClassVar = {
        "no scale": ("p = tl.exp2(scores * scale - new_max[:, None])", "p = tl.exp2(scores - new_max[:, None])"),
        "sign of the scale": ("        scores = -scores\n", "        scores = scores\n"),
        "keys after the last counted": ("tl.where((offs_n < count)[None, :]", "tl.where((offs_n <= count)[None, :]"),
        "maximum of the tile alone": (
            "new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)",
            "new_max = tl.max(scores, 1) * scale",
        ),
        "row_sum not rescaled": ("row_sum * alpha + tl.sum(p, 1)", "row_sum + tl.sum(p, 1)"),
        "acc1 not rescaled, flash": ("acc1 * alpha[:, None])", "acc1)"),
        "acc2 not rescaled, flash": ("acc2 * alpha[:, None])", "acc2)"),
        "acc not rescaled, wide": ("v, acc * alpha[:, None])", "v, acc)"),
        "scores of the second block dropped": ("scores = tile_dot(q2, tl.trans(k), scores)", "scores = scores + 0.0"),
        "values of the second block are the first's": (
            "v = _tile(values, offs_n, keys_left, stride, offs_d2, ",
            "v = _tile(values, offs_n, keys_left, stride, offs_d2 - BLOCK_D1, ",
        ),
        "only the first step of block_k": (
            "for piece in range(0, HEAD_DIM, BLOCK_K)",
            "for piece in range(0, BLOCK_K, BLOCK_K)",
        ),
        "tail of the keys dropped": (
            "tail_start if TAIL else 0, loop_end, BLOCK_N",
            "tail_start if TAIL else 0, tail_start, BLOCK_N",
        ),
        "values are keys": ("values = keys + features", "values = keys"),
        "keys are queries": (
            "+ (heads + tl.program_id(1)) * HEAD_DIM\n            values",
            "+ tl.program_id(1) * HEAD_DIM\n            values",
        ),
        "heads swapped": (
            "result = out + (sample + start_m) * features + tl.program_id(1) * HEAD_DIM",
            "result = out + (sample + start_m) * features + (heads - 1 - tl.program_id(1)) * HEAD_DIM",
        ),
        "first sample's queries": (
            "queries = qkv + (sample + start_m) * stride + tl.program_id(1) * HEAD_DIM\n    q1",
            "queries = qkv + start_m * stride + tl.program_id(1) * HEAD_DIM\n    q1",
        ),
        "parts overlap": (
            "loop_start = tail_start if TAIL else split * split_keys",
            "loop_start = tail_start if TAIL else 0",
        ),
        "parts weighed alike": ("beta = tl.exp2(split_max - new_max)", "beta = tl.exp2(new_max - new_max)"),
        "parts' row_sum weighed alike": ("row_sum * alpha + split_sum * beta", "row_sum * alpha + split_sum"),
        "earlier parts not rescaled": ("acc = acc * alpha[:, None] + v", "acc = acc + v"),
        "last part alone": ("for split in range(split_k):", "for split in range(split_k - 1, split_k):"),
    }

    @pytest.mark.parametrize("scale", [1.0, -1.0])
    def test_scores_beyond_exp(self, scale: float) -> None:
        """Scores in the tens of thousands neither overflow nor lose more than eager does, in every form."""
        case = Case("attention", "beyond exp", lambda d: {"qkv": d.normal(1, 39, 60) * 100, "heads": 1, "scale": scale})
        for config in (None, *self.configs):
            assert self.check(case, torch.float32, config), (config, self.found)

    @pytest.mark.parametrize("broken", [torch.inf, torch.nan])
    def test_nothing_hides_an_overflow(self, broken: float) -> None:
        """An infinite key makes every row that weighs it NaN, as it does in eager; one that is NaN all of them."""
        qkv = torch.randn(1, 20, 3 * 16, generator=torch.Generator().manual_seed(0))
        qkv[0, 3, 20] = broken
        expected = test_attention.eager(qkv, 1, 0.25).isnan()
        assert expected.any()
        for config in (None, *self.configs):
            assert self.call({"qkv": qkv, "heads": 1, "scale": 0.25}, config).isnan()[expected].all(), config


def test_head_blocks_cover_every_head() -> None:
    """One or two powers of two that tl.dot takes; the second is not empty work, and the sum never pads more."""
    for head_dim in range(1, 600):
        first, second = head_blocks(head_dim)
        assert first + second >= head_dim, head_dim
        assert first in (16, 32, 64, 128, 256, 512, 1024), head_dim
        assert second == 0 or (16 <= second < first < head_dim), head_dim
        assert first + second <= max(1 << (head_dim - 1).bit_length(), 16), head_dim


def test_library_counts_what_it_launches() -> None:
    """The attention and the copy, and six launches that pad q, k and v if the head dimension is no multiple of 8."""
    calls = [Attention(torch.empty(1, 9, 6 * head_dim, device="meta"), 2, 1.0) for head_dim in (48, 10)]
    assert [call.plan(Config("library")).kernels for call in calls] == [2, 8]


def test_head_blocks_of_the_networks() -> None:
    assert [head_blocks(head_dim) for head_dim in (48, 64, 256)] == [(32, 16), (64, 0), (256, 0)]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: str(gpu.arch))
def test_one_wide_head_fills_the_gpu(gpu: Gpu) -> None:
    """At least three quarters of it, at a decoder's 4096 tokens, by the same configuration for any batch size."""
    one, many = (
        Attention(torch.empty(n, 4096, 768, device="meta", dtype=torch.float16), 1, 1.0).heuristic(gpu) for n in (1, 7)
    )
    assert one == many
    programs = 4096 // one.block_m * one.split_k
    waves = -(-programs // gpu.multiprocessors)
    assert programs >= 0.75 * waves * gpu.multiprocessors
