"""patch_embed: non-overlapping patches of a latent, projected to tokens, plus the position table.

    out[n, y*w+x, d] = table[y*w+x, d] + sum_{c,i,j} weight[d,c,i,j] * z[n,c,y*p+i,x*p+j]

Layouts: z [N,C,H,W], weight [D,C,p,p], table [h*w,D] with h = H/p, w = W/p (the convolution's bias is folded
into it), out [N,h*w,D] contiguous. SD3's PatchEmbed with a fixed table. `patch_embed_row_moments` also returns the
statistics of its rows (ops/norm/row_moments.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, nbytes, nhwc, widest_dtype
from tinysr_kernels.ops.library_math import conv2d
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.norm.row_moments import PART, RowMoments, out_moments
from tinysr_kernels.ops.reference_math import compute_dtype


@dataclass(frozen=True)
class Config:
    """A launch of patch_embed: tokens and features per program, elements of a patch per step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int


@register
@dataclass(slots=True, eq=False)
class PatchEmbed(Operator):
    """One embedding; fields and mathematics as in the module's docstring."""

    name = "patch_embed"
    config = Config
    tuned_by = ("z", "weight", "table")

    z: Tensor
    weight: Tensor
    table: Tensor

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """[N,h*w,D] of the result."""
        return self.z.shape[0], self.table.shape[0], self.table.shape[1]

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("z", self.z, "N,C,H,W")
        check_rank("weight", self.weight, "D,C,p,p")
        _, c, h, w = self.z.shape
        d, p = self.weight.shape[0], self.weight.shape[2]
        check_shape("weight", self.weight, (d, c, p, p))
        check(h % p == 0 and w % p == 0, f"z must be a multiple of the patch size {p} per side, found {h}x{w}")
        check_shape("table", self.table, ((h // p) * (w // p), d))

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider; any floating dtype, the result has z's."""
        dtype = compute_dtype(self.z.dtype)
        patches = conv2d(contiguous_as(self.z, dtype), contiguous_as(self.weight, dtype), stride=self.weight.shape[2])
        return contiguous_as(patches.flatten(2).transpose(1, 2) + self.table.to(dtype), self.z.dtype)

    def library(self) -> Tensor:
        """The library's convolution, then the table added in place."""
        z = nhwc(self.z)
        patches = nhwc(conv2d(z, nhwc(self.weight.to(z.dtype)), stride=self.weight.shape[2]))
        return contiguous_as(patches.flatten(2).transpose(1, 2).add_(self.table))

    def empty(self) -> Tensor:
        """[N,h*w,D], contiguous, of z's dtype."""
        return self.z.new_empty(self.out_shape)

    def cost(self) -> Cost:
        """FLOPs of the projection; bytes of every tensor once."""
        n, tokens, d = self.out_shape
        moved = nbytes(*self.tensors) + n * tokens * d * self.z.element_size()
        return Cost(2 * n * tokens * self.weight.numel(), moved)

    def bucket(self) -> str:
        """dtype, shape of the weight, tokens of a sample up to a power of two."""
        d, c, p, _ = self.weight.shape
        return f"{dtype_name(self.z)} {c}x{p}x{p}->{d} {next_power_of_2(self.table.shape[0])}"

    def heuristic(self, gpu: Gpu) -> Config:
        """All of a patch in one step where it fits: the reduction is short, the store takes the time."""
        if self.z.element_size() == 4:
            return Config(32, next_power_of_2(self.weight.shape[0], most=64), 16, 4)
        block_k = next_power_of_2(self.weight[0].numel(), most=64)
        return Config(64, next_power_of_2(self.weight.shape[0], most=128), block_k, 4)

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out = self.z.new_empty(self.out_shape)
        n, tokens, d = self.out_shape
        patch = self.weight.shape[2]
        arguments = {
            "z": nhwc(self.z),
            "weight": nhwc(self.weight.to(widest_dtype(self.z, self.weight))),
            "table": contiguous_as(self.table),
            "out": out,
            "out_moments": out_moments(self, config, out),
            "M": n * tokens,
            "sample_tokens": tokens,
            "across": self.z.shape[3] // patch,
            "N": d,
            "CHANNELS": self.z.shape[1],
            "PATCH": patch,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "PART": PART,
        }
        grid = (cdiv(n * tokens, config.block_m), cdiv(d, config.block_n))
        return Plan(out, (Launch(linear_kernel.patch_embed, grid, arguments, config.num_warps, 1),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """Tiles around the heuristic's."""
        block_k = next_power_of_2(self.weight[0].numel(), most=64 if self.z.element_size() == 2 else 16)
        for block_m, columns, num_warps in itertools.product((16, 32, 64, 128), (32, 64, 128), (2, 4, 8)):
            if block_m * columns <= 2048 * num_warps:
                yield Config(block_m, next_power_of_2(self.weight.shape[0], most=columns), block_k, num_warps)


@register
class PatchEmbedRowMoments(RowMoments, PatchEmbed):
    """The same, and the statistics of the result's rows."""

    __slots__ = ()
    name = "patch_embed_row_moments"
