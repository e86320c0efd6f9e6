"""Per-channel statistics ("moments") of a convolution's result, for the GroupNorm that follows: `<operator>_moments`.

    out     = operator(...)                                                [N,O,H,W]
    moments = mean and biased variance of every channel of out over H, W   [N,2,O], float32 or wider

The convolution computes them from its tiles while these are in registers, so that GroupNorm reads its input once. The
variance is never E[v^2] - mean^2, which cancels; parts are merged by Chan's rule (Chan, Golub, LeVeque, "Algorithms
for computing the sample variance", The American Statistician 37, 1983).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator
from tinysr_kernels.ops.layout import nbytes, nhwc
from tinysr_kernels.ops.library_math import narrow
from tinysr_kernels.ops.norm.kernels import channel_moments as moments_kernel
from tinysr_kernels.ops.reference_math import compute_dtype

CACHED = 1 << 17
"""Elements per block of `channel_moments_of`: half a megabyte of float32."""


def channel_moments_of(out: Tensor) -> Tensor:
    """[N,O,H,W] -> [N,2,O]: mean and biased variance of every channel, in float32 or wider.

    On a CPU by blocks of pixels that fit its cache, which takes a fifth of the time.
    """
    n, channels, _, _ = out.shape
    pixels = nhwc(out).permute(0, 2, 3, 1).reshape(n, -1, channels)
    block = max(CACHED // channels, 1) if out.device.type == "cpu" else pixels.shape[1]
    parts = [part.to(compute_dtype(out.dtype)) for part in pixels.split(block, 1)]
    means = torch.stack([part.mean(1) for part in parts], 1)
    squares = torch.stack([(part - part.mean(1, keepdim=True)).square_().sum(1) for part in parts], 1)
    # Made on the device: a copy from the host cannot be captured in a CUDA graph.
    counts = torch.full((len(parts), 1), block, dtype=means.dtype, device=out.device)
    counts[-1].fill_(parts[-1].shape[1])
    mean = (means * counts).sum(1, keepdim=True) / pixels.shape[1]
    square = squares.sum(1) + ((means - mean).square() * counts).sum(1)
    return torch.stack([mean[:, 0], square / pixels.shape[1]], 1)


def library_moments_of(out: Tensor) -> Tensor:
    """The same by the statistics pass of PyTorch's batch norm, which needs no float32 copy of an image in 16 bits."""
    if not narrow(out):
        return channel_moments_of(out)
    if out.is_meta:  # PyTorch has no meta form of it; one operation stands for it in a trace
        return out.flatten(2).mean(2, dtype=torch.float32)[:, None].expand(-1, 2, -1)
    mean = variance = None
    if out.device.type == "cpu":  # float32 running statistics, ignored else, make the results float32, as on a GPU
        mean, variance = (out.new_ones(out.shape[1], dtype=torch.float32) for _ in range(2))
    samples = [torch.stack(torch.batch_norm_update_stats(sample, mean, variance, 0.0)) for sample in nhwc(out).split(1)]
    return samples[0][None] if len(samples) == 1 else torch.stack(samples)


def scratch(out: Tensor, parts: int) -> Tensor:
    """An uninitialized [N,3,O,parts] float32 for the statistics of `parts` tiles of a result [N,O,H,W]."""
    return out.new_empty((out.shape[0], 3, out.shape[1], parts), dtype=torch.float32)


def with_moments(plan: Plan) -> Plan:
    """The plan of a convolution, with the statistics of its result [N,2,O] float32 as a second result.

    Where its last launch does not fill `scratch_moments` (the library backend, split-K), one more launch computes them.
    """
    if plan.launches[-1].arguments.get("scratch_moments") is None:
        plan = Plan(plan.result, (*plan.launches, launch_moments(plan.result)))
    parts = plan.launches[-1].arguments["scratch_moments"]
    n, _, channels, _ = parts.shape
    moments = parts.new_empty((n, 2, channels))
    return Plan((plan.result, moments), (*plan.launches, launch_merge(parts, moments[:, 0], moments[:, 1])))


def launch_merge(parts: Tensor, mean: Tensor, variance: Tensor) -> Launch:
    """Merge `scratch_moments` [N,3,C,parts] into mean and biased variance [N,C], which have equal strides."""
    n, _, channels, count = parts.shape
    arguments = {
        "scratch_moments": parts,
        "scratch_mean": mean,
        "scratch_variance": variance,
        "stride": mean.stride(0),
        "channels": channels,
        "parts": count,
        # Two sizes, for the number of parts is the image's: one or four per thread.
        "BLOCK_PARTS": 128 if count <= 128 else 512,
    }
    return Launch(moments_kernel.merge, (channels, n), arguments, 4, 1)


def launch_moments(image: Tensor) -> Launch:
    """The statistics of blocks of some 1024 elements of an image [N,C,H,W] in channels_last memory."""
    n, outputs, h, w = image.shape
    block_n = next_power_of_2(outputs, most=64)
    block_m = 1024 // block_n
    blocks = cdiv(h * w, block_m)
    arguments = {
        "out": image,
        "scratch_moments": scratch(image, blocks),
        "pixels": h * w,
        "outputs": outputs,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
    }
    return Launch(moments_kernel.block_moments, (blocks, cdiv(outputs, block_n), n), arguments, 4, 1)


class ChannelMoments(Operator):
    """Mixin that precedes a convolution among the bases: the call also returns its result's per-channel statistics.

    The convolution's plan fills `scratch_moments` where it can if the call is an instance of this class.
    """

    __slots__ = ()
    returns = "(Tensor, Tensor)"

    def reference(self) -> Any:
        """The convolution's reference, and `channel_moments_of` its result."""
        out = super().reference()
        return out, channel_moments_of(out)

    def library(self) -> Any:
        """The convolution by the library, and the statistics of its result; networks do not ask for them then."""
        out = super().library()
        return out, library_moments_of(out)

    def empty(self) -> Any:
        """The convolution's result, and [N,2,O] in float32 or wider."""
        out: Tensor = super().empty()
        return out, out.new_empty((out.shape[0], 2, out.shape[1]), dtype=compute_dtype(out.dtype))

    def cost(self) -> Cost:
        """The convolution's, 3 FLOPs per element of the result, and the bytes of the statistics."""
        least, (out, moments) = super().cost(), self.empty()
        return Cost(least.flops + 3 * out.numel(), least.bytes + nbytes(moments))

    def plan(self, config: Any) -> Plan:
        """The convolution's launches and one that merges the statistics of its tiles."""
        return with_moments(super().plan(config))
