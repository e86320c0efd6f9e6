"""A convolution's result and the GroupNorm that follows it: `<operator>_norm`.

    out    = operator(...)                                                                          [N,O,H,W]
    normed = group_norm(out, normed_skip, normed_weight, normed_bias, normed_groups, ...)          [N,O+C2,H,W]

`ops/norm/group_norm.py` has the mathematics: normed_weight and normed_bias [O+C2], normed_skip [N,C2,H,W] or None. The
image's size decides what is fused. With split-K the launch that adds the partial sums normalizes too. Where groups are
too large for one program, the convolution stores the statistics of its tiles per group, and the launch that normalizes
merges them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost
from tinysr_kernels.ops.checks import check, check_choice, check_rank, check_shape
from tinysr_kernels.ops.conv import implicit_gemm
from tinysr_kernels.ops.conv.implicit_gemm import Convolution
from tinysr_kernels.ops.conv.kernels import conv3x3 as conv3x3_kernel
from tinysr_kernels.ops.conv.kernels import conv_norm as conv_norm_kernel
from tinysr_kernels.ops.layout import contiguous_as, empty_nhwc, nhwc
from tinysr_kernels.ops.norm.channel_moments import launch_merge, with_moments
from tinysr_kernels.ops.norm.group_norm import Config as NormConfig
from tinysr_kernels.ops.norm.group_norm import GroupNorm, single, splits

FORMS = ("group", "tiles", "split")
MAX_TILES = 512
"""Tiles whose statistics each program of the normalizing launch merges itself; a launch of its own merges more."""


@dataclass(frozen=True)
class Config(implicit_gemm.Config):
    """The convolution's, and how its result is normalized.

    norm_form: "group", one program per group; "tiles", from the statistics of the convolution's tiles per group, or per
    channel where the statistics come from another launch or a block of channels has no whole groups; "split",
    group_norm's three launches. The rest are group_norm's: pixels and channels per program, chunks of the image for the
    statistics, warps and stages.
    """

    norm_form: str
    norm_block_m: int
    norm_block_n: int
    norm_chunks: int
    norm_num_warps: int
    norm_num_stages: int


@dataclass(eq=False, kw_only=True)
class NormAfter(Convolution):
    """Mixin that precedes a convolution among the bases: the call also returns the GroupNorm of its result."""

    returns = "(Tensor, Tensor)"
    config = Config
    tuned_by: ClassVar[tuple[str, ...]] = ("normed_groups", "normed_skip")

    normed_weight: Tensor
    normed_bias: Tensor
    normed_groups: int
    normed_eps: float
    normed_silu: bool = True
    normed_skip: Tensor | None = None

    @property
    def normed_shape(self) -> tuple[int, int, int, int]:
        """[N,O+C2,H,W] of the normalized result."""
        n, o, h, w = self.out_shape
        return n, o + (0 if self.normed_skip is None else self.normed_skip.shape[1]), h, w

    @property
    def normed_group_size(self) -> int:
        """Channels per group."""
        return self.normed_shape[1] // self.normed_groups

    def norm_after(self, out: Tensor, moments: Tensor | None = None) -> GroupNorm:
        """The GroupNorm of the convolution's result."""
        norm = (self.normed_weight, self.normed_bias, self.normed_groups, self.normed_eps, self.normed_silu)
        return GroupNorm(out, self.normed_skip, *norm, moments=moments)

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        super().check()
        n, _, h, w = self.out_shape
        if self.normed_skip is not None:
            check_rank("normed_skip", self.normed_skip, "N,C,H,W")
            check_shape("normed_skip", self.normed_skip, (n, self.normed_skip.shape[1], h, w))
        c, groups = self.normed_shape[1], self.normed_groups
        check_shape("normed_weight", self.normed_weight, (c,))
        check_shape("normed_bias", self.normed_bias, (c,))
        check(groups > 0 and c % groups == 0, f"normed_groups must divide {c} channels, found {groups}")

    def reference(self) -> tuple[Tensor, Tensor]:
        """The convolution's reference, and group_norm's on its result."""
        out = super().reference()
        return out, self.norm_after(out).reference()

    def library(self) -> tuple[Tensor, Tensor]:
        """The convolution by the library, and group_norm's library form on its result."""
        out = super().library()
        return out, self.norm_after(out).library()

    def empty(self) -> tuple[Tensor, Tensor]:
        """The convolution's result, and [N,O+C2,H,W] in channels_last memory, of x's dtype."""
        return super().empty(), empty_nhwc(self.x, self.normed_shape)

    def cost(self) -> Cost:
        """The convolution's and group_norm's; the result counts once, not as group_norm's input."""
        least, elements = super().cost(), math.prod(self.normed_shape)
        return Cost(
            least.flops + elements * (9 if self.normed_silu else 5),
            least.bytes + elements * self.x.element_size(),
        )

    def bucket(self) -> str:
        """The convolution's, groups, channels of normed_skip."""
        skip = "" if self.normed_skip is None else f"+{self.normed_skip.shape[1]}"
        return f"{super().bucket()} in {self.normed_groups}{skip}"

    def heuristic(self, gpu: Gpu) -> Config:
        """The convolution's, and the norm that suits it; independent of the batch size."""
        conv = super().heuristic(gpu)
        return self._with_norm(gpu, conv)

    def _with_norm(self, gpu: Gpu, conv: implicit_gemm.Config) -> Config:
        """conv, and for the norm: one program per small group, else what reads the image once."""
        _, c, h, w = self.normed_shape
        found = self.norm_after(torch.empty(self.out_shape, dtype=self.x.dtype, device="meta")).heuristic(gpu)
        if conv.split_k > 1 and not splits(h * w, self.normed_group_size):
            # The launch that adds the partial sums reads the image in any case.
            found = single(h * w, self.normed_group_size)
        form, block_m, block_n, chunks, num_warps, num_stages = dataclasses.astuple(found)
        if form == "single":
            form = "group"
            if conv.split_k > 1:
                # All partial sums are loaded at once: more than 4 values of each per thread, or 8 of two, would spill
                # registers on some card; in groups of 33 to 64 channels so would 4 in 16 warps.
                block_m = next_power_of_2(h * w, least=1, most=max((4096 if conv.split_k == 2 else 2048) // block_n, 1))
                elements = block_m * block_n
                num_warps = 8 if elements < 2048 or (elements == 2048 and block_n == 64) else 16
        elif self.normed_skip is None:
            form, num_warps, num_stages = "tiles", 8, 3
            # Rows of 64 bytes in half precision; with wider ones a program would have to merge more groups.
            block_n = next_power_of_2(c, most=max(32, next_power_of_2(self.normed_group_size)))
            block_m = next_power_of_2(h * w, least=1, most=max(4096 // block_n, 1))
            chunks = min(cdiv(2 * gpu.multiprocessors, cdiv(c, block_n)), cdiv(h * w, block_m))
        return Config(
            **vars(conv),
            norm_form=form,
            norm_block_m=block_m,
            norm_block_n=block_n,
            norm_chunks=chunks,
            norm_num_warps=num_warps,
            norm_num_stages=num_stages,
        )

    def plan(self, config: Any) -> Plan:
        """The convolution's launches, with the norm fused into the last or after it."""
        check_choice("norm_form", config.norm_form, FORMS)
        conv = super().plan(config)
        out: Tensor = conv.result
        *first, last = conv.launches
        launches, moments = conv.launches, None
        if isinstance(last, Launch):
            merges = last.kernel is conv3x3_kernel.merge_splits and last.arguments["scratch_partials"] is not out
            if config.norm_form == "group" and merges:
                normed = empty_nhwc(out, self.normed_shape)
                return Plan((out, normed), (*first, self._merge_splits(config, last, normed)))
            if config.norm_form == "tiles" and last.kernel is conv3x3_kernel.conv and self.normed_skip is None:
                size = self.normed_group_size
                if size == next_power_of_2(size, least=1) and size <= min(config.block_n, config.norm_block_n):
                    normed = empty_nhwc(out, self.normed_shape)
                    return Plan((out, normed), (*first, *self._tiles(config, last, out, normed)))
                launches = (*first, _storing_moments(config, last, out, out.shape[1]))
        if config.norm_form == "tiles" and self.normed_skip is None:
            both = with_moments(Plan(out, launches))
            launches, moments = both.launches, both.result[1]
        form, block_n = "split", config.norm_block_n
        if config.norm_form == "group":
            form, block_n = "single", max(block_n, next_power_of_2(self.normed_group_size, least=1))
        rest = (config.norm_chunks, config.norm_num_warps, config.norm_num_stages)
        after = self.norm_after(out, moments).plan(NormConfig(form, config.norm_block_m, block_n, *rest))
        return Plan((out, after.result), (*launches, *after.launches))

    def _merge_splits(self, config: Config, last: Launch, normed: Tensor) -> Launch:
        """conv3x3_kernel.merge_splits with the norm in the same launch."""
        outputs = last.arguments["OUT_CHANNELS"]
        arguments = {k: v for k, v in last.arguments.items() if k not in ("BLOCK_M", "BLOCK_N")} | {
            **self._affine(normed),
            "skip": nhwc(self.normed_skip),
            "SKIP_C": normed.shape[1] - outputs,
            "GROUP_SIZE": self.normed_group_size,
            "SILU": self.normed_silu,
            "BLOCK_M": config.norm_block_m,
            "BLOCK_N": max(config.norm_block_n, next_power_of_2(self.normed_group_size, least=1)),
            "WHOLE": config.norm_block_m >= last.arguments["pixels"],
        }
        grid = (self.normed_groups, normed.shape[0])
        return Launch(conv_norm_kernel.merge_splits_norm, grid, arguments, config.norm_num_warps, 1)

    def _affine(self, normed: Tensor) -> dict[str, Any]:
        return {
            "norm_weight": contiguous_as(self.normed_weight),
            "norm_bias": contiguous_as(self.normed_bias),
            "normed": normed,
            "eps": self.normed_eps,
        }

    def _tiles(self, config: Config, last: Launch, out: Tensor, normed: Tensor) -> Iterator[Launch]:
        """The convolution, which stores its tiles' statistics per group; their merging, if many; the normalization."""
        n, c, h, w = out.shape
        conv = _storing_moments(config, last, out, self.normed_groups)
        yield conv
        moments = conv.arguments["scratch_moments"]
        parts = moments.shape[3]
        merged = parts > MAX_TILES
        if merged:
            whole = moments.new_empty((n, 2, self.normed_groups))
            yield launch_merge(moments, whole[:, 0], whole[:, 1])
            moments = whole
        chunk_pixels = cdiv(h * w, config.norm_chunks)
        size = self.normed_group_size
        arguments = {
            "x": out,
            "scratch_moments": moments,
            **self._affine(normed),
            "pixels": h * w,
            "parts": parts,
            "chunk_pixels": chunk_pixels,
            "OUT_CHANNELS": c,
            "GROUP_SIZE": size,
            "MERGED": merged,
            "SILU": self.normed_silu,
            "BLOCK_PARTS": next_power_of_2(parts, least=1, most=max(2048 * size // config.norm_block_n, 1)),
            "BLOCK_M": config.norm_block_m,
            "BLOCK_N": config.norm_block_n,
            "NUM_STAGES": config.norm_num_stages,
        }
        grid = (cdiv(h * w, chunk_pixels), cdiv(c, config.norm_block_n), n)
        yield Launch(conv_norm_kernel.apply, grid, arguments, config.norm_num_warps, config.norm_num_stages)

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """The convolution's with the norm that suits each, and other tiles of the norm after the heuristic's."""
        for conv in super().space(gpu):
            yield self._with_norm(gpu, conv)
        usual = self.heuristic(gpu)
        for factor, num_warps in itertools.product((1, 2, 4), (4, 8)):
            block_m = max(usual.norm_block_m * factor // 2, 1)
            yield dataclasses.replace(usual, norm_block_m=block_m, norm_num_warps=num_warps)


def _storing_moments(config: Config, last: Launch, out: Tensor, groups: int) -> Launch:
    """conv3x3_kernel.conv that stores its tiles' statistics, for so many groups of its channels."""
    parts = last.grid[0] // cdiv(out.shape[1], config.block_n)
    moments = out.new_empty((out.shape[0], 3, groups, parts), dtype=torch.float32)
    more = {"scratch_moments": moments, "GROUP_SIZE": out.shape[1] // groups}
    return dataclasses.replace(last, arguments={**last.arguments, **more})
