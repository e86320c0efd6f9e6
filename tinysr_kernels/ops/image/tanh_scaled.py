"""tanh_scaled: the soft clamp at a decoder's input.

    out = tanh(gain * z)

Layouts: z [N,C,H,W], out the same in channels_last.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check_rank
from tinysr_kernels.ops.image.kernels import tanh_scaled as kernels
from tinysr_kernels.ops.layout import dtype_name, empty_nhwc, nbytes, nhwc
from tinysr_kernels.ops.reference_math import compute_dtype


@dataclass(frozen=True)
class Config:
    """A launch of tanh_scaled. block_size: elements per program."""

    block_size: int
    num_warps: int


@register
@dataclass(slots=True, eq=False)
class TanhScaled(Operator):
    """One soft clamp; fields and mathematics as in the module's docstring."""

    name = "tanh_scaled"
    config = Config
    tuned_by = ("z",)

    z: Tensor
    gain: float

    def check(self) -> None:
        """ValueError unless z has four dimensions."""
        check_rank("z", self.z, "N,C,H,W")

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider; any floating dtype."""
        return nhwc(torch.tanh(nhwc(self.z).to(compute_dtype(self.z.dtype)) * self.gain).to(self.z.dtype))

    def library(self) -> Tensor:
        """PyTorch's tanh in z's dtype."""
        return nhwc(self.z).mul(self.gain).tanh_()

    def empty(self) -> Tensor:
        """[N,C,H,W] in channels_last memory, of z's dtype."""
        return empty_nhwc(self.z, tuple(self.z.shape))

    def cost(self) -> Cost:
        """FLOPs: 2 per element; bytes of z and the result once."""
        return Cost(2 * self.z.numel(), nbytes(self.z) + self.z.numel() * self.z.element_size())

    def bucket(self) -> str:
        """dtype, elements up to a power of two."""
        return f"{dtype_name(self.z)} {next_power_of_2(self.z.numel())}"

    def heuristic(self, gpu: Gpu) -> Config:
        """16 bytes per thread."""
        return Config(4096 // self.z.element_size() // 2, 4)

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out, numel = self.empty(), self.z.numel()
        arguments = {
            "z": nhwc(self.z),
            "out": out,
            "gain": float(self.gain),
            "numel": numel,
            "BLOCK_SIZE": config.block_size,
        }
        return Plan(out, (Launch(kernels.scale, (cdiv(numel, config.block_size),), arguments, config.num_warps, 1),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """More and fewer elements per program."""
        for block_size, num_warps in itertools.product((256, 512, 1024, 2048), (2, 4, 8)):
            yield Config(block_size, num_warps)
