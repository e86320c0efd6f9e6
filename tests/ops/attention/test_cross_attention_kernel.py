"""The kernel of cross_attention on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from tests.ops.attention import test_cross_attention
from tests.ops.cases import Case
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.launch.device import GPUS, Gpu
from tinysr_kernels.ops.attention.cross_attention import Config, CrossAttention
from tinysr_kernels.ops.attention.kernels import cross_attention as kernels


class TestCrossAttentionKernels(KernelContract):
    contract = test_cross_attention.TestCrossAttention
    kernels = kernels
    # Small blocks, so that few tokens have several of each kind and ragged ends.
    configs: ClassVar = {
        "small": Config(block_m=32, block_n=16, num_warps=4, num_stages=2),
        "all keys at once": Config(block_m=64, block_n=64, num_warps=4, num_stages=1),
    }
    mutations: ClassVar = {
        "acc1 not rescaled": ("acc1 * alpha[:, None])", "acc1)"),
        "acc2 not rescaled": ("acc2 * alpha[:, None])", "acc2)"),
        "scores of the second block dropped": ("scores = tile_dot(q2, tl.trans(k), scores)", "scores = scores + 0.0"),
        "values of the second block are the first's": (
            "v = _tile(values + at, offs_n, left, HEAD_DIM, offs_d2, ",
            "v = _tile(values + at, offs_n, left, HEAD_DIM, offs_d2 - BLOCK_D1, ",
        ),
        "first tile of keys alone": ("tl.range(0, context, BLOCK_N,", "tl.range(0, BLOCK_N, BLOCK_N,"),
        "first head's keys": ("keys += head * context * HEAD_DIM", "keys += 0 * head"),
        "first head's values": ("values += head * context * HEAD_DIM", "values += 0 * head"),
        "first sample's queries": (
            "queries = q + first * stride + head * HEAD_DIM",
            "queries = q + (first - tl.program_id(2) * tokens) * stride + head * HEAD_DIM",
        ),
        "keys of the first tile again": (
            "at, left = start * HEAD_DIM, context - start",
            "at, left = 0, context - start",
        ),
        "not normalized": ("mixed = round_to(acc1 / row_sum[:, None], ", "mixed = round_to(acc1, "),
    }

    @pytest.mark.parametrize("scale", [1.0, -1.0])
    def test_scores_beyond_exp(self, scale: float) -> None:
        """Scores in the tens of thousands neither overflow nor lose more than eager does."""
        case = Case(
            "cross_attention",
            "beyond exp",
            lambda d: {
                "q": d.normal(1, 39, 20) * 100,
                "keys": d.normal(1, 21, 20) * 100,
                "values": d.normal(1, 21, 20),
                "scale": scale,
            },
        )
        for config in (None, *self.configs):
            assert self.check(case, torch.float32, config), (config, self.found)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: str(gpu.arch))
def test_a_prompt_is_covered_closely(gpu: Gpu) -> None:
    """At most a quarter of the keys' tiles is padding at 77 tokens, and one configuration serves any batch."""
    keys = torch.empty(5, 77, 64, dtype=torch.float16, device="meta")
    one, many = (
        CrossAttention(torch.empty(n, 4096, 320, dtype=torch.float16, device="meta"), keys, keys, 0.1).heuristic(gpu)
        for n in (1, 7)
    )
    assert one == many
    assert -(-77 // one.block_n) * one.block_n <= 77 * 1.25
