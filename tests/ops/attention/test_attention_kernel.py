"""attention's kernels in each form, on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from tests.ops.attention import test_attention
from tests.ops.cases import Case
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.launch.device import GPUS
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.attention.attention import Config, slices
from tinysr_kernels.ops.attention.kernels import attention as attention_kernel


class TestAttentionKernels(KernelContract):
    contract = test_attention.TestAttention
    kernels = attention_kernel
    # Small blocks, so that few tokens have several of each kind and ragged ends.
    configs: ClassVar = {
        "wide, in slices and parts": Config(
            "wide", rows=32, keys=16, warps=4, stages=1, apart=False, depth=64, columns=128, parts=3
        ),
        "wide, in parts": Config("wide", rows=32, keys=32, warps=4, stages=2, depth=256, columns=256, parts=2),
        "flash": Config("flash", rows=32, keys=16, warps=4, stages=2),
        "flash, one loop": Config("flash", rows=64, keys=32, warps=4, stages=2, apart=False),
        "library": Config("library"),
    }
    mutations: ClassVar = {
        "no scale": ("powers = tl.exp2(scores * scale - new[:, None])", "powers = tl.exp2(scores - new[:, None])"),
        "sign of the scale": ("        scores = -scores\n", "        scores = scores\n"),
        "keys behind the last counted": ("tl.where((lane < count)[None, :]", "tl.where((lane <= count)[None, :]"),
        "highest of the tile alone": (
            "new = tl.maximum(highest, tl.max(scores, 1) * scale)",
            "new = tl.max(scores, 1) * scale",
        ),
        "total not rescaled": ("total * again + tl.sum(powers, 1)", "total + tl.sum(powers, 1)"),
        "sums not rescaled, flash": ("first_sum * again[:, None])", "first_sum)"),
        "second sums not rescaled, flash": ("second_sum * again[:, None])", "second_sum)"),
        "sums not rescaled, wide": ("v, sums * again[:, None])", "v, sums)"),
        "second slice's scores dropped": ("scores = tile_dot(second_q, tl.trans(k), scores)", "scores = scores + 0.0"),
        "second slice's values are the first's": (
            "v = _tile(values, key_lane, left, stride, back, ",
            "v = _tile(values, key_lane, left, stride, back - FIRST, ",
        ),
        "only the first slice of depth": ("for piece in range(0, WIDTH, DEPTH)", "for piece in range(0, DEPTH, DEPTH)"),
        "rest of the keys dropped": ("whole if REST else 0, end, KEYS", "whole if REST else 0, whole, KEYS"),
        "values are keys": ("values = keys + features", "values = keys"),
        "keys are queries": (
            "+ (heads + tl.program_id(1)) * WIDTH\n            values",
            "+ tl.program_id(1) * WIDTH\n            values",
        ),
        "heads swapped": (
            "result = out + (sample + top) * features + tl.program_id(1) * WIDTH",
            "result = out + (sample + top) * features + (heads - 1 - tl.program_id(1)) * WIDTH",
        ),
        "first sample's queries": (
            "queries = qkv + (sample + top) * stride + tl.program_id(1) * WIDTH\n    first_q",
            "queries = qkv + top * stride + tl.program_id(1) * WIDTH\n    first_q",
        ),
        "parts overlap": ("first = whole if REST else number * part", "first = whole if REST else 0"),
        "parts weighed alike": ("weight = tl.exp2(high - new)", "weight = tl.exp2(new - new)"),
        "parts' totals weighed alike": ("total * again + powers * weight", "total * again + powers"),
        "earlier parts not rescaled": ("sums = sums * again[:, None] + v", "sums = sums + v"),
        "last part alone": ("for number in range(parts):", "for number in range(parts - 1, parts):"),
    }

    @pytest.mark.parametrize("scale", [1.0, -1.0])
    def test_scores_beyond_exp(self, scale: float) -> None:
        """Scores in the tens of thousands neither overflow nor lose more than eager does, in every form."""
        case = Case("attention", "beyond exp", lambda d: {"qkv": d.normal(1, 39, 60) * 100, "heads": 1, "scale": scale})
        for config in (None, *self.configs):
            assert self.check(case, torch.float32, config), (config, self.found)

    def test_nothing_hides_an_overflow(self) -> None:
        """An infinite key makes every row that weighs it NaN, as it does in eager."""
        qkv = torch.randn(1, 20, 3 * 16, generator=torch.Generator().manual_seed(0))
        qkv[0, 3, 20] = torch.inf
        expected = test_attention.eager(qkv, 1, 0.25).isnan()
        assert expected.any()
        for config in (None, *self.configs):
            assert self.call({"qkv": qkv, "heads": 1, "scale": 0.25}, config).isnan()[expected].all(), config


def test_slices_cover_every_head() -> None:
    """Two powers of two that a product takes, or one; the first leaves something to the second, never more padding."""
    for width in range(1, 600):
        first, second = slices(width)
        assert first + second >= width, width
        assert first in (16, 32, 64, 128, 256, 512, 1024), width
        assert second == 0 or (16 <= second < first < width), width
        assert first + second <= max(1 << (width - 1).bit_length(), 16), width


def test_library_counts_what_it_launches() -> None:
    """The attention and the copy; and six launches to pad q, k and v where heads are no multiple of 8."""
    kernels = REGISTRY["attention"].kernels
    assert kernels is not None
    plans = [kernels.plan(Config("library"), torch.empty(1, 9, 6 * width, device="meta"), 2, 1.0) for width in (48, 10)]
    assert [plan.kernels for plan in plans] == [2, 8]


def test_slices_of_the_networks() -> None:
    assert [slices(width) for width in (48, 64, 256)] == [(32, 16), (64, 0), (256, 0)]


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: str(gpu.arch))
def test_one_wide_head_fills_the_card(gpu) -> None:
    """Three quarters of it or more, with a decoder's 4096 tokens, and in the same way for any batch."""
    kernels = REGISTRY["attention"].kernels
    assert kernels is not None
    one, many = (
        kernels.heuristic(gpu, torch.empty(n, 4096, 768, device="meta", dtype=torch.float16), 1) for n in (1, 7)
    )
    assert one == many
    programs = 4096 // one.rows * one.parts
    waves = -(-programs // gpu.multiprocessors)
    assert programs >= 0.75 * waves * gpu.multiprocessors
