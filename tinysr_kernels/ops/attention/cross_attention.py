"""cross_attention: attention of image tokens to a constant context, such as the embedding of a prompt.

    per head h: out = softmax(scale * q_h keys_h^T) values_h

Layouts: q [N,T,heads*d], out alike and contiguous, heads side by side in the last dimension; keys and values
[heads,S,d], the same for all samples. Any d, any S.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.attention.attention import head_blocks
from tinysr_kernels.ops.attention.kernels import cross_attention as kernels
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, nbytes
from tinysr_kernels.ops.reference_math import compute_dtype


@dataclass(frozen=True)
class Config:
    """A launch of cross_attention. block_m and block_n: queries per program, keys per step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@register
@dataclass(slots=True, eq=False)
class CrossAttention(Operator):
    """One cross-attention; fields and mathematics as in the module's docstring."""

    name = "cross_attention"
    config = Config
    tuned_by = ("q", "keys")

    q: Tensor
    keys: Tensor
    values: Tensor
    scale: float

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check_rank("q", self.q, "N,T,heads*d")
        check_rank("keys", self.keys, "heads,S,d")
        heads, _, head_dim = self.keys.shape
        check_shape("q", self.q, (*self.q.shape[:2], heads * head_dim))
        check_shape("values", self.values, tuple(self.keys.shape))
        check(self.keys.shape[1] > 0, f"keys must be of one token at least, found {list(self.keys.shape)}")

    def reference(self) -> Tensor:
        """PyTorch's scaled dot product attention in float32 or wider; any floating dtype."""
        return self._attended(compute_dtype(self.q.dtype))

    def library(self) -> Tensor:
        """PyTorch's scaled dot product attention in q's dtype."""
        return self._attended(self.q.dtype)

    def _attended(self, dtype: torch.dtype) -> Tensor:
        """The result, computed in a dtype."""
        q = contiguous_as(self.q, dtype).unflatten(2, (self.keys.shape[0], -1)).transpose(1, 2)
        k, v = (contiguous_as(t, dtype).expand(len(q), -1, -1, -1) for t in (self.keys, self.values))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return contiguous_as(out.transpose(1, 2).reshape(self.q.shape), self.q.dtype)

    def empty(self) -> Tensor:
        """[N,T,heads*d], contiguous, of q's dtype."""
        return self.q.new_empty(self.q.shape)

    def cost(self) -> Cost:
        """FLOPs of the two matmuls and 5 per score for the softmax; bytes of every tensor once."""
        heads, context, _ = self.keys.shape
        n, tokens, features = self.q.shape
        flops = n * tokens * context * (4 * features + 5 * heads)
        return Cost(flops, nbytes(*self.tensors) + nbytes(self.q))

    def bucket(self) -> str:
        """dtype, heads, tokens up to a power of two, keys; the same for any batch size."""
        heads, context, head_dim = self.keys.shape
        return f"{dtype_name(self.q)} {heads}x{head_dim} {next_power_of_2(self.q.shape[1])} {context}"

    def heuristic(self, gpu: Gpu) -> Config:
        """The same for any batch size. Blocks of 32 keys: three of them cover 77 with a fifth to spare."""
        tokens, (heads, context, head_dim) = self.q.shape[1], self.keys.shape
        if self.q.element_size() > 2 or head_dim > 128:
            # Without tensor cores both operands of a matmul lie in registers.
            return Config(32 if head_dim <= 64 else 16, 16, 4, 1)
        block_n = next_power_of_2(context, least=16, most=32 if head_dim > 64 or 0 < context % 64 <= 32 else 64)
        large = head_dim <= 64 and cdiv(tokens, 128) * heads >= gpu.multiprocessors
        return Config(128, block_n, 8, 2) if large else Config(64, block_n, 4, 2)

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out = self.empty()
        heads, context, head_dim = self.keys.shape
        n, tokens, _ = self.q.shape
        first, second = head_blocks(head_dim)
        arguments = {
            "q": contiguous_as(self.q),
            "keys": contiguous_as(self.keys, self.q.dtype),
            "values": contiguous_as(self.values, self.q.dtype),
            "out": out,
            "scale": abs(self.scale) * math.log2(math.e),
            "tokens": tokens,
            "context": context,
            "heads": heads,
            "NEGATIVE": self.scale < 0,
            "HAS_TAIL": context % config.block_n > 0,
            "HEAD_DIM": head_dim,
            "BLOCK_D1": first,
            "BLOCK_D2": second,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "NUM_STAGES": config.num_stages,
        }
        grid = (cdiv(tokens, config.block_m), heads, n)
        return Plan(out, (Launch(kernels.cross, grid, arguments, config.num_warps, config.num_stages),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """Around the heuristic's; in half precision only, for heads of up to 128, more than one size."""
        usual = self.heuristic(gpu)
        yield usual
        if self.q.element_size() == 2 and self.keys.shape[2] <= 128:
            sizes = itertools.product((32, 64, 128), (16, 32, 64), (4, 8), (1, 2))
            for block_m, block_n, num_warps, num_stages in sizes:
                if block_m * block_n >= 256 * num_warps:
                    yield Config(block_m, block_n, num_warps, num_stages)
