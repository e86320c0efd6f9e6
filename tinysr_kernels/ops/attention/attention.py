"""attention: non-causal multi-head self-attention over a packed qkv tensor.

    [q, k, v] = qkv in thirds of the last dimension; per head: out = softmax(scale * q k^T) v

Layouts: qkv [N,T,3*heads*d], out [N,T,heads*d] contiguous, heads side by side in the last dimension. Any d.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Library, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.attention.kernels import attention as kernels
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_choice, check_rank
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, nbytes
from tinysr_kernels.ops.reference_math import compute_dtype

FORMS = ("flash", "wide", "library")
WHOLE_TOKENS = 64
"""Networks' images give multiples of this many tokens; other numbers of tokens get other kernel variants."""
MAX_SPLIT_K = 8
SPLIT_COST = 4
"""Cost of storing and merging one part's sums, in tiles of keys: they are as many bytes as such a number of tiles."""


@dataclass(frozen=True)
class Config:
    """The launches of attention. form: "flash" or "wide" (kernels/attention.py), or "library", PyTorch's own.

    block_m and block_n: queries and keys per tile. separate_tail: whether the keys after the last whole tile have their
    own loop, which keeps the mask out of the hot loop. "wide" alone: block_k, features of the head per step of the
    scores' reduction; block_d, features of the result per program; split_k, parts of the keys.
    """

    form: str
    block_m: int = 0
    block_n: int = 0
    num_warps: int = 0
    num_stages: int = 0
    separate_tail: bool = True
    block_k: int = 0
    block_d: int = 0
    split_k: int = 1


def head_blocks(head_dim: int) -> tuple[int, int]:
    """Two powers of two, 16 or larger, whose sum covers a head; the second is 0 if one power of two is as small."""
    whole = next_power_of_2(head_dim)
    first = whole // 2
    second = next_power_of_2(head_dim - first)
    return (first, second) if first >= 16 and second < first else (whole, 0)


@register
@dataclass(slots=True, eq=False)
class Attention(Operator):
    """One self-attention; fields and mathematics as in the module's docstring."""

    name = "attention"
    config = Config
    tuned_by = ("qkv", "heads")

    qkv: Tensor
    heads: int
    scale: float

    @property
    def tokens(self) -> int:
        """T, tokens per sample."""
        return self.qkv.shape[1]

    @property
    def head_dim(self) -> int:
        """d, features per head."""
        return self.qkv.shape[2] // 3 // self.heads

    @property
    def out_shape(self) -> tuple[int, int, int]:
        """[N,T,heads*d] of the result."""
        n, tokens, features = self.qkv.shape
        return n, tokens, features // 3

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check(self.heads > 0, f"heads must be at least 1, found {self.heads}")
        check_rank("qkv", self.qkv, "N,T,3*heads*d")
        divides = self.qkv.shape[2] % (3 * self.heads) == 0
        check(divides, f"qkv must be [N,T,3*{self.heads}*d], found {list(self.qkv.shape)}")

    def reference(self) -> Tensor:
        """PyTorch's scaled dot product attention in float32 or wider; any floating dtype."""
        return self._attended(compute_dtype(self.qkv.dtype))

    def library(self) -> Tensor:
        """PyTorch's scaled dot product attention in qkv's dtype."""
        return self._attended(self.qkv.dtype)

    def _attended(self, dtype: torch.dtype) -> Tensor:
        """The result, computed in a dtype."""
        n, tokens, features = self.out_shape
        qkv = contiguous_as(self.qkv, dtype).view(n, tokens, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return contiguous_as(out.transpose(1, 2).reshape(n, tokens, features), self.qkv.dtype)

    def empty(self) -> Tensor:
        """[N,T,heads*d], contiguous, of qkv's dtype."""
        return self.qkv.new_empty(self.out_shape)

    def cost(self) -> Cost:
        """FLOPs of the two matmuls and 5 per score for the softmax; bytes of qkv and the result once."""
        n, tokens, features = self.out_shape
        flops = n * tokens * tokens * (4 * features + 5 * self.heads)
        return Cost(flops, nbytes(self.qkv) + n * tokens * features * self.qkv.element_size())

    def bucket(self) -> str:
        """dtype, heads, tokens up to a power of two, whether they are whole tiles; the same for any batch size."""
        tail = "" if self.tokens % WHOLE_TOKENS == 0 else " ragged"
        return f"{dtype_name(self.qkv)} {self.heads}x{self.head_dim} {next_power_of_2(self.tokens)}{tail}"

    def heuristic(self, gpu: Gpu) -> Config:
        """The same for any batch size, so that a sample's sums have the same order in any batch."""
        tokens, head_dim = self.tokens, self.head_dim
        if self.qkv.element_size() > 2:
            # Without tensor cores both operands of a matmul lie in registers: a small block_k.
            block_d = next_power_of_2(head_dim, most=256)
            config = Config("wide", 64, 32, 8, 1, separate_tail=False, block_k=16, block_d=block_d)
        elif head_dim <= 64:
            # The fewest queries for the multiprocessor with the most programs; at equal numbers a tile of 128, which
            # reads keys and values half as often as one of 64.
            block_m = min((128, 64), key=lambda rows: self._rows(gpu, rows))
            return Config("flash", block_m, WHOLE_TOKENS, block_m // 16, 3)
        elif head_dim <= 128:
            # Two loops, or 64 keys, would spill on some architecture.
            return Config("flash", 64, 32, 8, 2, separate_tail=False)
        elif head_dim > 256:
            config = Config("wide", 64, 32, 8, 2, block_k=64, block_d=256)
        elif tokens % WHOLE_TOKENS or gpu.shared_limit < 160 * 1024:
            # 64 keys need 106 KB of shared memory or, with their second loop, all registers.
            config = Config("wide", 64, 32, 8, 2, block_k=256, block_d=256)
        else:
            # 128 queries need 193 KB: keys and values are read half as often, which the L2 must deliver.
            block_m = 128 if gpu.shared_limit >= 200 * 1024 and tokens >= 128 else 64
            config = Config("wide", block_m, WHOLE_TOKENS, 8, 2, block_k=256, block_d=256)
        return replace(config, split_k=self._split_k(gpu, config))

    def _rows(self, gpu: Gpu, block_m: int) -> int:
        """Queries of one multiprocessor, of all heads of a sample."""
        return cdiv(cdiv(self.tokens, block_m) * self.heads, gpu.multiprocessors) * block_m

    def _split_k(self, gpu: Gpu, config: Config) -> int:
        """The number of parts of the keys that takes the fewest steps, at one program per multiprocessor."""
        programs = cdiv(self.tokens, config.block_m) * cdiv(self.head_dim, config.block_d) * self.heads
        steps = cdiv(self.tokens, config.block_n)

        def time(split_k: int) -> int:
            waves = cdiv(programs * split_k, gpu.multiprocessors)
            return waves * (cdiv(steps, split_k) + (SPLIT_COST if split_k > 1 else 0))

        best = min(range(1, min(MAX_SPLIT_K, steps) + 1), key=time)
        # The sums of the parts take memory: not for a small gain.
        return best if time(best) < 0.8 * time(1) else 1

    def plan(self, config: Config) -> Plan:
        """One launch, or two for split_k > 1. ValueError for an unknown form."""
        check_choice("form", config.form, FORMS)
        out = self.empty()
        qkv = contiguous_as(self.qkv)
        if config.form == "library":
            # The attention and the copy; if d is no multiple of 8, q, k and v are first filled and copied for padding.
            arguments = {"qkv": qkv, "out": out, "heads": self.heads, "scale": self.scale}
            return Plan(out, (Library(library, arguments, 2 if self.head_dim % 8 == 0 else 8),))
        shared = {
            "qkv": qkv,
            "scale": abs(self.scale) * math.log2(math.e),
            "tokens": self.tokens,
            "heads": self.heads,
            "NEGATIVE": self.scale < 0,
            "HAS_TAIL": self.tokens % config.block_n > 0,
            "SEPARATE_TAIL": config.separate_tail,
            "HEAD_DIM": self.head_dim,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "NUM_STAGES": config.num_stages,
        }
        return Plan(
            out, self._flash(config, shared, out) if config.form == "flash" else self._wide(config, shared, out)
        )

    def _flash(self, config: Config, shared: dict[str, Any], out: Tensor) -> tuple[Launch, ...]:
        first, second = head_blocks(self.head_dim)
        arguments = {**shared, "out": out, "BLOCK_D1": first, "BLOCK_D2": second}
        grid = (cdiv(self.tokens, config.block_m), self.heads, out.shape[0])
        return (Launch(kernels.flash, grid, arguments, config.num_warps, config.num_stages),)

    def _wide(self, config: Config, shared: dict[str, Any], out: Tensor) -> tuple[Launch, ...]:
        n, tokens, heads, head_dim = out.shape[0], self.tokens, self.heads, self.head_dim
        split_keys = cdiv(cdiv(tokens, config.block_n), config.split_k) * config.block_n
        split_k = cdiv(tokens, split_keys)
        shapes = {
            "scratch_out": (n, heads, split_k, tokens, head_dim),
            "scratch_max": (n, heads, split_k, tokens),
            "scratch_sum": (n, heads, split_k, tokens),
        }
        split = split_k > 1
        scratch = {name: out.new_empty(s, dtype=torch.float32) if split else None for name, s in shapes.items()}
        arguments = {
            **shared,
            **scratch,
            "out": None if split else out,
            "split_keys": split_keys,
            "split_k": split_k,
            "BLOCK_K": config.block_k,
            "BLOCK_D": config.block_d,
        }
        grid = (cdiv(tokens, config.block_m) * split_k * cdiv(head_dim, config.block_d), heads, n)
        launch = Launch(kernels.wide, grid, arguments, config.num_warps, config.num_stages)
        if not split:
            return (launch,)
        block_d = next_power_of_2(head_dim)
        block_m = max(2048 // block_d, 1)
        sizes = {"tokens": tokens, "heads": heads, "split_k": split_k, "HEAD_DIM": head_dim}
        merged = {**scratch, "out": out, **sizes, "BLOCK_D": block_d, "BLOCK_M": block_m}
        return launch, Launch(kernels.merge_splits, (cdiv(tokens, block_m), heads, n), merged, 4, 1)

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """The library; flash for heads of up to 128 in half precision; else wide, with and without split-K."""
        half = self.qkv.element_size() == 2
        yield Config("library")
        yield self.heuristic(gpu)
        if half and self.head_dim <= 128:
            for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
                yield Config("flash", *sizes)
                yield Config("flash", *sizes, separate_tail=False)
            return
        block_d = next_power_of_2(self.head_dim, most=256)
        steps = (64, block_d) if half else (16, 32)
        for sizes in itertools.product((32, 64, 128), (32, 64), (4, 8), (1, 2)):
            for block_k, split_k in itertools.product(steps, (1, 2, 4, 8)):
                yield Config("wide", *sizes, half, block_k, block_d, split_k)


def library(qkv: Tensor, out: Tensor, heads: int, scale: float) -> None:
    """PyTorch's scaled dot product attention in qkv's dtype, with the kernel that it selects; copied into out.

    qkv [N,T,3*heads*d], out [N,T,heads*d].
    """
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    out.unflatten(2, (heads, -1)).copy_(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2))
