"""The kernel of joint_attention on every case of the operator."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from benchmarks.static.machine_code import compile_all, front_end_error, variant
from tests.ops.attention import test_joint_attention
from tests.ops.cases import CASES, Case
from tests.ops.kernel_contract import KernelContract
from tinysr_kernels.launch.device import GPUS, Gpu
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops.attention.joint_attention import Config, JointAttention
from tinysr_kernels.ops.attention.kernels import joint_attention as kernels


class TestJointAttentionKernels(KernelContract):
    contract = test_joint_attention.TestJointAttention
    kernels = kernels
    # Small blocks, so that few tokens have several of each kind and ragged ends.
    configs: ClassVar = {
        "small": Config(block_m=32, block_n=16, num_warps=4, num_stages=2),
        "all keys of a stream at once": Config(block_m=64, block_n=64, num_warps=4, num_stages=1),
    }
    mutations: ClassVar = {
        "acc1 not rescaled": ("acc1 * alpha[:, None])", "acc1)"),
        "acc2 not rescaled": ("acc2 * alpha[:, None])", "acc2)"),
        "scores of the second block dropped": ("scores = tile_dot(q2, tl.trans(k), scores)", "scores = scores + 0.0"),
        "values of the second block are the first's": (
            "v = _tile(values, offs_n, left, stride, offs_d2, ",
            "v = _tile(values, offs_n, left, stride, offs_d2 - BLOCK_D1, ",
        ),
        "keys of the image alone": ("tl.static_range(0, 2)", "tl.static_range(0, 1)"),
        "keys of the text alone": ("tl.static_range(0, 2)", "tl.static_range(1, 2)"),
        "first tile of keys alone": ("tl.range(0, count, BLOCK_N,", "tl.range(0, BLOCK_N, BLOCK_N,"),
        "first sample's keys": ("before = sample * (text_step if TEXT else tokens)", "before = sample * 0"),
        "a text for each sample": ("(text_step if TEXT else tokens)", "(context if TEXT else tokens)"),
        "first sample's queries of the text": ("(sample * text_step + start_m)", "(sample * 0 + start_m)"),
        "queries of the text from the image": ("tl.where(of_text, text + ", "tl.where(of_text, image + "),
        "text's rows without the samples before": ("* tokens + sample * context + start_m", "* tokens + start_m"),
        "text's rows behind one image": ("tl.num_programs(2).to(tl.int64) * tokens + ", "tokens + "),
        "as many rows of text as of image": (
            "tl.where(of_text, context - start_m, ",
            "tl.where(of_text, tokens - start_m, ",
        ),
        "queries as keys": ("((PARTS - 2) * heads + head)", "(0 * heads + head)"),
        "keys as values": ("values = keys + features", "values = keys"),
        "tail of the text unmasked": (
            "scale, NEGATIVE, TEXT_TAIL if TEXT else IMAGE_TAIL",
            "scale, NEGATIVE, False if TEXT else IMAGE_TAIL",
        ),
        "tail of the image unmasked": (
            "scale, NEGATIVE, TEXT_TAIL if TEXT else IMAGE_TAIL",
            "scale, NEGATIVE, TEXT_TAIL if TEXT else False",
        ),
        "not normalized": ("mixed = round_to(acc1 / row_sum[:, None], ", "mixed = round_to(acc1, "),
    }

    @pytest.mark.parametrize("scale", [1.0, -1.0])
    def test_scores_beyond_exp(self, scale: float) -> None:
        """Scores in the tens of thousands neither overflow nor lose more than eager does."""
        case = Case(
            "joint_attention",
            "beyond exp",
            lambda d: {
                "image": d.normal(1, 39, 60) * 100,
                "text": d.normal(1, 21, 60) * 100,
                "heads": 1,
                "scale": scale,
            },
        )
        for config in (None, *self.configs):
            assert self.check(case, torch.float32, config), (config, self.found)


@pytest.mark.long
def test_every_case_compiles() -> None:
    """By Triton's own front end, which takes less than its interpreter does."""
    calls = [JointAttention(**case.arguments(torch.float16)).on_meta() for case in CASES["joint_attention"]]
    plans = [call.plan(call.heuristic(GPUS[90])) for call in calls]
    variants = [variant(90, launch) for plan in plans for launch in plan.launches if isinstance(launch, Launch)]
    assert len(variants) == len(calls)
    assert [error for error in compile_all(variants, 1, None, front_end_error) if error] == []


@pytest.mark.parametrize("gpu", GPUS.values(), ids=lambda gpu: str(gpu.arch))
def test_one_configuration_for_any_batch(gpu: Gpu) -> None:
    one, many = (
        JointAttention(
            torch.empty(n, 1024, 4608, dtype=torch.float16, device="meta"),
            torch.empty(m, 333, 4608, dtype=torch.float16, device="meta"),
            24,
            0.125,
        )
        for n, m in ((1, 1), (7, 7))
    )
    assert one.heuristic(gpu) == many.heuristic(gpu)
    assert one.bucket() == many.bucket()
