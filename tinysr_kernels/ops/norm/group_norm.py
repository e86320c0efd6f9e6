"""group_norm: GroupNorm of one tensor or of the concatenation of two, then SiLU unless silu=False.

    v = concat(x, skip) over channels; per sample and group of C/groups channels: mean and biased variance
    out = act((v - mean) / sqrt(variance + eps) * weight + bias)          act = SiLU or identity

Layouts: x [N,C1,H,W], skip [N,C2,H,W] or None, weight and bias [C1+C2], out [N,C1+C2,H,W] channels_last.
A group may contain channels of both x and skip, and have any size. moments [N,2,C1] and skip_moments [N,2,C2]: mean and
biased variance of every channel, as the producers of x and skip return them (`ops/norm/channel_moments.py`); then the
statistics are not computed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2, programs_wanted
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.library_math import narrow
from tinysr_kernels.ops.norm.channel_moments import CACHED, channel_moments_of, library_moments_of
from tinysr_kernels.ops.norm.kernels import group_norm as kernels
from tinysr_kernels.ops.reference_math import activate, compute_dtype

SINGLE_ELEMENTS = 1 << 13
"""Elements of the largest group that one program normalizes while other multiprocessors have nothing to do: about what
it does in the time of two more launches. Twice as many where a group's channels are whole 16-byte accesses."""
CACHED_ELEMENTS = 1 << 16
"""Elements of the largest group that one program normalizes at all (`splits`): 128 KB in half precision."""


@dataclass(frozen=True)
class Config:
    """The launches of group_norm. form: "single", or "split" into chunks (kernels/group_norm.py).

    block_m and block_n: pixels and channels of a program's tile; with moments as arguments nothing else counts.
    chunks: into how many parts the statistics pass of "split" divides the image.
    """

    form: str
    block_m: int
    block_n: int
    chunks: int
    num_warps: int
    num_stages: int


def splits(pixels: int, group_size: int) -> bool:
    """Whether groups of `group_size` channels are too large for one program, so that producers' statistics help."""
    return pixels * group_size > CACHED_ELEMENTS


def single(pixels: int, group_size: int) -> Config:
    """One program per group of `group_size` channels."""
    block_n = next_power_of_2(group_size, least=1)
    block_m = next_power_of_2(pixels, least=1, most=max(4096 // block_n, 1))
    elements = block_m * block_n
    # With 8 warps, groups of 40 channels spill registers on Ada.
    num_warps = 16 if elements >= 4096 and block_n > 32 else 8 if elements >= 2048 else 4
    return Config("single", block_m, block_n, 1, num_warps, 1)


@register
@dataclass(slots=True, eq=False)
class GroupNorm(Operator):
    """One GroupNorm; fields and mathematics as in the module's docstring."""

    name = "group_norm"
    config = Config
    tuned_by = ("x", "skip", "groups", "moments")

    x: Tensor
    skip: Tensor | None
    weight: Tensor
    bias: Tensor
    groups: int
    eps: float
    silu: bool = True
    moments: Tensor | None = None
    skip_moments: Tensor | None = None

    @property
    def channels(self) -> int:
        """Channels of the result, C1 + C2."""
        return self.x.shape[1] + (0 if self.skip is None else self.skip.shape[1])

    @property
    def group_size(self) -> int:
        """Channels per group."""
        return self.channels // self.groups

    @property
    def pixels(self) -> int:
        """Pixels per sample."""
        return self.x.shape[2] * self.x.shape[3]

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[N,C1+C2,H,W] of the result."""
        n, _, h, w = self.x.shape
        return n, self.channels, h, w

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("x", self.x, "N,C,H,W")
        n, _, h, w = self.x.shape
        if self.skip is not None:
            check_rank("skip", self.skip, "N,C,H,W")
            check_shape("skip", self.skip, (n, self.skip.shape[1], h, w))
        c = self.channels
        check_shape("weight", self.weight, (c,))
        check_shape("bias", self.bias, (c,))
        check(self.groups > 0 and c % self.groups == 0, f"groups must divide {c} channels, found {self.groups}")
        check_shape("moments", self.moments, (n, 2, self.x.shape[1]))
        check_shape("skip_moments", self.skip_moments, (n, 2, c - self.x.shape[1]))
        given = [t is not None for t in (self.moments, self.skip_moments)]
        together = given[0] == given[1] if self.skip is not None else not given[1]
        check(together, "moments must be given for each of x and skip or for none of them")

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider; any floating dtype."""
        n, c, h, w = self.out_shape
        dtype = compute_dtype(self.x.dtype)
        images = [self.x] if self.skip is None else [self.x, self.skip]
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if self.moments is None and c * self.pixels <= CACHED:
            # Contiguous planes, because torch computes the variance of channels_last ones as E[v^2] - mean^2: at a mean
            # of 50 standard deviations its error is 4.5e-4 in float32, against 2.6e-6 this way. torch.group_norm,
            # unlike torch.nn.functional's, accepts a group of a single element (a 1x1 image).
            planes = contiguous_as(torch.cat(images, 1), dtype)
            return self._finish(torch.group_norm(planes, self.groups, weight, bias, self.eps))
        if self.moments is None:  # of a large image, which is not copied twice for that
            moments = torch.cat([channel_moments_of(image) for image in images], 2)
        else:
            moments = self._given_moments()
        mean, variance = (t.view(n, c, 1, 1) for t in self._of_groups(moments, dtype))
        rstd = (variance + self.eps).rsqrt()
        y = empty_nhwc(self.x, (n, c, h, w), dtype)
        begin = 0
        for image in images:
            own = slice(begin, begin + image.shape[1])
            torch.sub(image, mean[:, own], out=y[:, own])
            begin = own.stop
        torch.addcmul(bias.view(-1, 1, 1), y, rstd * weight.view(-1, 1, 1), out=y)
        return self._finish(y)

    def library(self) -> Tensor:
        """In 16 bits by the two passes of PyTorch's batch norm: statistics, and an affine map per channel.

        They keep channels_last memory, where PyTorch's group_norm copies an image to planes and back on a GPU, and
        cancels in its variance on a CPU. Float32 is the reference's.
        """
        if not narrow(self.x):
            return self.reference()
        image = nhwc(self.x if self.skip is None else torch.cat([self.x, self.skip], 1))
        moments = library_moments_of(image) if self.moments is None else self._given_moments()
        affine = (self.weight.float(), self.bias.float())
        normed = [
            F.batch_norm(sample, mean, variance, *affine, eps=self.eps)
            for sample, mean, variance in zip(image.split(1), *self._of_groups(moments, torch.float32), strict=True)
        ]
        return self._finish(normed[0] if len(normed) == 1 else torch.cat(normed))

    def _given_moments(self) -> Tensor:
        """The statistics among the arguments, [N,2,C1+C2]."""
        return torch.cat([t for t in (self.moments, self.skip_moments) if t is not None], 2)

    def _of_groups(self, moments: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and variance of the group of every channel, each [N,C1+C2], from those of the channels."""
        n, _, c = moments.shape
        means, variances = contiguous_as(moments, dtype).view(n, 2, self.groups, self.group_size).unbind(1)
        between, mean = torch.var_mean(means, 2, correction=0, keepdim=True)
        variance = variances.mean(2, keepdim=True) + between
        return mean.expand(means.shape).reshape(n, c), variance.expand(means.shape).reshape(n, c)

    def _finish(self, y: Tensor) -> Tensor:
        """The activation, then one rounding."""
        return nhwc(activate(y, "silu" if self.silu else "none").to(self.x.dtype))

    def empty(self) -> Tensor:
        """[N,C1+C2,H,W] in channels_last memory, of x's dtype."""
        return empty_nhwc(self.x, self.out_shape)

    def cost(self) -> Cost:
        """FLOPs per element: 3 for statistics unless they are arguments, 2 for the affine map, 4 for SiLU.

        Bytes of every tensor once.
        """
        elements = self.x.shape[0] * self.channels * self.pixels
        flops = elements * ((3 if self.moments is None else 0) + 2 + (4 if self.silu else 0))
        return Cost(flops, nbytes(*self.tensors) + elements * self.x.element_size())

    def bucket(self) -> str:
        """dtype, channels, groups, pixels up to a power of two, whether moments are arguments; not the batch size."""
        skip = "" if self.skip is None else f"+{self.skip.shape[1]}"
        variant = "" if self.moments is None else " moments"
        pixels = next_power_of_2(self.pixels)
        return f"{dtype_name(self.x)} {self.x.shape[1]}{skip} in {self.groups} {pixels}{variant}"

    def heuristic(self, gpu: Gpu) -> Config:
        """The same for any batch size, so that a sample's sums have the same order in any batch."""
        c, pixels = self.channels, self.pixels
        if self.moments is not None:
            block_n = next_power_of_2(c, most=64)
            return Config("split", next_power_of_2(pixels, least=1, most=4096 // block_n), block_n, 1, 8, 1)
        most = SINGLE_ELEMENTS * (2 if self.group_size * self.x.element_size() % 16 == 0 else 1)
        if self.groups >= programs_wanted(gpu):
            most = CACHED_ELEMENTS
        if pixels * self.group_size <= most:
            return single(pixels, self.group_size)
        block_n = next_power_of_2(c, most=64)
        # A tile of 4096 elements would take 80 registers, and spill some of them in Triton 3.6.
        block_m = 2048 // block_n
        chunks = min(cdiv(programs_wanted(gpu), cdiv(c, block_n)), cdiv(pixels, block_m))
        return Config("split", block_m, block_n, chunks, 8, 3)

    def plan(self, config: Config) -> Plan:
        """One launch, or three for "split" without moments. ValueError for "single" with block_n below a group."""
        out = self.empty()
        if self.moments is not None:
            return Plan(out, (self._from_moments(config, out),))
        if config.form == "single":
            return Plan(out, (self._single(config, out),))
        return Plan(out, self._split(config, out))

    def _inputs(self) -> dict[str, Any]:
        """The input images, dense, and their sizes, as every kernel that reads them takes them."""
        x_channels = self.x.shape[1]
        return {
            "x": nhwc(self.x),
            "skip": nhwc(self.skip),
            "pixels": self.pixels,
            "channels": self.channels,
            "x_channels": x_channels,
            "skip_channels": self.channels - x_channels,
        }

    def _normalization(self, config: Config, inputs: dict[str, Any], out: Tensor) -> dict[str, Any]:
        """The arguments of every kernel that writes the result, except the statistics."""
        return {
            **inputs,
            "weight": contiguous_as(self.weight),
            "bias": contiguous_as(self.bias),
            "out": out,
            "group_size": self.group_size,
            "SILU": self.silu,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        }

    def _output_grid(self, config: Config) -> tuple[int, int, int]:
        """Tiles of the result."""
        return cdiv(self.pixels, config.block_m), cdiv(self.channels, config.block_n), self.x.shape[0]

    def _from_moments(self, config: Config, out: Tensor) -> Launch:
        arguments = {
            **self._normalization(config, self._inputs(), out),
            "moments": contiguous_as(self.moments),
            "skip_moments": contiguous_as(self.skip_moments),
            "eps": self.eps,
            "GROUP_BLOCK": next_power_of_2(self.group_size, least=1),
        }
        grid = self._output_grid(config)
        return Launch(kernels.from_moments, grid, arguments, config.num_warps, config.num_stages)

    def _single(self, config: Config, out: Tensor) -> Launch:
        fits = config.block_n >= self.group_size
        check(fits, f"single needs block_n of at least {self.group_size} channels, found {config.block_n}")
        arguments = {**self._normalization(config, self._inputs(), out), "eps": self.eps}
        grid = (self.groups, self.x.shape[0])
        return Launch(kernels.single, grid, arguments, config.num_warps, config.num_stages)

    def _split(self, config: Config, out: Tensor) -> tuple[Launch, Launch, Launch]:
        """Statistics of chunks of the image, per channel; their merging, per group; the normalization."""
        n, c = self.x.shape[0], self.channels
        chunk_pixels = cdiv(self.pixels, config.chunks)
        chunks = cdiv(self.pixels, chunk_pixels)
        inputs, shapes = self._inputs(), ((n, chunks, c), (n, self.groups))
        per_chunk, per_group = (torch.empty(shape, dtype=torch.float32, device=self.x.device) for shape in shapes)
        of_chunks = {"scratch_mean": per_chunk, "scratch_squares": torch.empty_like(per_chunk)}
        of_groups = {"scratch_center": per_group, "scratch_rstd": torch.empty_like(per_group)}
        measured = {
            **inputs,
            **of_chunks,
            "chunk_pixels": chunk_pixels,
            "chunks": chunks,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "NUM_STAGES": config.num_stages,
        }
        block_n = next_power_of_2(self.group_size, least=1)
        merged = {
            **of_chunks,
            **of_groups,
            "eps": self.eps,
            "pixels": self.pixels,
            "channels": c,
            "group_size": self.group_size,
            "chunk_pixels": chunk_pixels,
            "chunks": chunks,
            "BLOCK_CHUNKS": max(1024 // block_n, 1),
            "BLOCK_N": block_n,
        }
        applied = {**self._normalization(config, inputs, out), **of_groups}
        grid = (chunks, cdiv(c, config.block_n), n)
        return (
            Launch(kernels.chunk_moments, grid, measured, config.num_warps, config.num_stages),
            Launch(kernels.merge_chunks, (self.groups, n), merged, 4, 1),
            Launch(kernels.apply, self._output_grid(config), applied, config.num_warps, config.num_stages),
        )

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """One launch where the group is small enough for one program; three with more or fewer chunks."""
        c, pixels = self.channels, self.pixels
        if self.moments is not None:
            for most, elements, num_warps in itertools.product((32, 64, 128), (1024, 2048, 4096, 8192), (4, 8)):
                block_n = next_power_of_2(c, most=most)
                block_m = next_power_of_2(pixels, least=1, most=elements // block_n)
                yield Config("split", block_m, block_n, 1, num_warps, 1)
            return
        block_n = next_power_of_2(self.group_size, least=1)
        if pixels * block_n <= 4 * CACHED_ELEMENTS:
            for elements, num_warps in itertools.product((1024, 2048, 4096, 8192), (4, 8)):
                block_m = next_power_of_2(pixels, least=1, most=max(elements // block_n, 1))
                yield Config("single", block_m, block_n, 1, num_warps, 1)
        for most, elements, programs in itertools.product((32, 64, 128), (2048, 4096), (1, 2, 4)):
            block_m, block_n = elements // most, next_power_of_2(c, most=most)
            chunks = min(cdiv(programs * gpu.multiprocessors, cdiv(c, block_n)), cdiv(pixels, block_m))
            for num_warps, num_stages in itertools.product((4, 8), (1, 3)):
                yield Config("split", block_m, block_n, chunks, num_warps, num_stages)
