"""linear: a matmul with its prologue and epilogue.

    v   = x @ weight.T + x2 @ weight2.T + bias
    out = residual + gate * act(v)

act: none, gelu_tanh (tanh approximation), or geglu: v = [a, g] in halves, a * gelu(g) with exact GELU. gate multiplies
where a gate could not be folded into the weight. Layouts: x [...,K], weight [O,K], x2 [...,K2], weight2 [O,K2], bias
[O]; with F = O, or O/2 for geglu: gate [F], residual and out [...,F], out contiguous.

With row_moments [...,2,ceil(K/32)] of x and weight_sums [O], the sums of weight's rows, x is the input of a LayerNorm
without affine part (ops/norm/row_moments.py), and there is no x2:

    v = (x @ weight.T - mean * weight_sums) / sqrt(variance + eps) + bias

`linear_row_moments` also returns such statistics of its result.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch, Plan, cdiv, next_power_of_2
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_choice, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, nbytes, widest_dtype
from tinysr_kernels.ops.linear import cublaslt
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.norm.row_moments import PART, RowMoments, check_row_moments, merge, out_moments
from tinysr_kernels.ops.reference_math import compute_dtype, matmul

LINEAR_ACTIVATIONS = ("none", "gelu_tanh", "geglu")


@dataclass(frozen=True)
class Config:
    """A launch of linear. form: "tile" (kernels/linear.py), or "library" (cuBLASLt), which ignores the other fields.

    block_m, block_n, block_n2: rows of a tile, features of its first block and of its second, 0 without one (geglu has
    one as wide as the first); block_k: elements of the reduction per step; group_m: L2 swizzle, blocks of rows that
    run together; split_k: programs that share one reduction, whose partial sums a second launch adds.
    """

    form: str
    block_m: int
    block_n: int
    block_n2: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    split_k: int = 1


LIBRARY = Config("library", 1, 1, 0, 1, 1, 1, 1)

MERGED_ROWS, MERGED_FEATURES = 8, 256
"""Output rows and features per program of `merge_splits`: 16 elements per thread."""

# Tiles in half precision, block_m x (block_n + block_n2), and the share of the arithmetic that each can hope to reach:
# larger ones load less per multiply-add. An ordering, not a measurement. The first is for Hopper alone, whose operands
# lie in shared memory: elsewhere it takes more registers than there are.
TILES = (
    (128, 256, 32, 1.0),
    (128, 128, 64, 1.0),
    (128, 128, 0, 0.95),
    (128, 64, 32, 0.85),
    (64, 128, 0, 0.8),
    (64, 64, 32, 0.7),
    (64, 64, 0, 0.65),
)
WIDEST, LARGE = TILES[:2]
HOPPER_TILES = (LARGE, (128, 64, 32, 0.85), (64, 128, 0, 0.8), (64, 64, 0, 0.65))
MERGE, MERGE_STEPS = 1 << 22, 512
"""Cost of split-K's second launch in multiply-adds of a multiprocessor: its own, and per element of the result."""


@register
@dataclass(slots=True, eq=False)
class Linear(Operator):
    """One matmul; fields and mathematics as in the module's docstring."""

    name = "linear"
    config = Config
    tuned_by = ("x", "weight", "activation", "x2", "row_moments")

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None
    gate: Tensor | None = None
    activation: str = "none"
    x2: Tensor | None = None
    weight2: Tensor | None = None
    row_moments: Tensor | None = None
    weight_sums: Tensor | None = None
    eps: float = 0.0

    @property
    def features(self) -> int:
        """F, the features of the result."""
        return self.weight.shape[0] // (2 if self.activation == "geglu" else 1)

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[...,F] of the result."""
        return (*self.x.shape[:-1], self.features)

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        x, x2, weight2 = self.x, self.x2, self.weight2
        check(x.dim() >= 1, f"x must be [...,K], found {list(x.shape)}")
        check_rank("weight", self.weight, "O,K")
        o = self.weight.shape[0]
        check_shape("weight", self.weight, (o, x.shape[-1]))
        check_shape("bias", self.bias, (o,))
        check_choice("activation", self.activation, LINEAR_ACTIVATIONS)
        even = self.activation != "geglu" or o % 2 == 0
        check(even, f"weight must have an even number of rows for geglu, found {o}")
        check((x2 is None) == (weight2 is None), "x2 and weight2 must be given together, found only one of them")
        if x2 is not None and weight2 is not None:
            check(x2.dim() >= 1, f"x2 must be [...,K2], found {list(x2.shape)}")
            check_shape("x2", x2, (*x.shape[:-1], x2.shape[-1]))
            check_shape("weight2", weight2, (o, x2.shape[-1]))
            check(self.row_moments is None, "x2 must not be given with row_moments, found both")
        check_row_moments(x, o, self.row_moments, self.weight_sums)
        check_shape("gate", self.gate, (self.features,))
        check_shape("residual", self.residual, self.out_shape)

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider; any floating dtype, the result has x's."""
        v = self._accumulators(compute_dtype(self.x.dtype))
        if self.activation == "gelu_tanh":
            torch.ops.aten.gelu_(v, approximate="tanh")
        elif self.activation == "geglu":
            a, g = v.chunk(2, -1)
            v = a * torch.ops.aten.gelu_(g)
        if self.gate is not None:
            v *= self.gate.to(v.dtype)
        if self.residual is not None:
            v += self.residual.to(v.dtype)
        return contiguous_as(v, self.x.dtype)

    def library(self) -> Tensor:
        """The cuBLASLt backend's calls after a LayerNorm of x itself, if there is one."""
        x, dtype = contiguous_as(self.x), self.x.dtype
        out = self.x.new_empty(self.out_shape)
        cublaslt.linear(
            x if self.row_moments is None else F.layer_norm(x, x.shape[-1:], eps=self.eps),
            contiguous_as(self.weight, dtype),
            contiguous_as(self.x2, dtype),
            contiguous_as(self.weight2, dtype),
            self.bias,
            contiguous_as(self.residual),
            contiguous_as(self.gate, dtype),
            out,
            self.activation,
        )
        return out

    def _accumulators(self, dtype: torch.dtype) -> Tensor:
        """v [...,O] in this dtype."""
        x, weight = contiguous_as(self.x, dtype), contiguous_as(self.weight, dtype)
        bias = contiguous_as(self.bias, dtype)
        if self.row_moments is None or self.weight_sums is None:
            v = matmul(x, weight, bias)
        else:
            mean, variance = merge(self.row_moments.to(dtype), x.shape[-1])
            v = matmul(x, weight)
            v.addcmul_(mean, self.weight_sums.to(dtype), value=-1).mul_((variance + self.eps).rsqrt())
            if bias is not None:
                v += bias
        if self.x2 is not None and self.weight2 is not None:
            v += matmul(contiguous_as(self.x2, dtype), contiguous_as(self.weight2, dtype))
        return v

    def empty(self) -> Tensor:
        """[...,F], contiguous, of x's dtype."""
        return self.x.new_empty(self.out_shape)

    def cost(self) -> Cost:
        """FLOPs of the matmuls; bytes of every tensor once."""
        rows = self.x.numel() // self.x.shape[-1]
        weights = self.weight.numel() + (0 if self.weight2 is None else self.weight2.numel())
        return Cost(2 * rows * weights, nbytes(*self.tensors) + rows * self.features * self.x.element_size())

    def bucket(self) -> str:
        """dtype, K and K2, weight's rows, rows of a sample up to a power of two, activation and norm."""
        depth = f"{self.x.shape[-1]}{'' if self.x2 is None else f'+{self.x2.shape[-1]}'}"
        fused = self.activation if self.row_moments is None else f"{self.activation} normed"
        return f"{dtype_name(self.x)} {depth}->{self.weight.shape[0]} {next_power_of_2(sample_rows(self.x))} {fused}"

    def heuristic(self, gpu: Gpu) -> Config:
        """The tile with the least time, by waves of programs and the share of the arithmetic that it can reach."""
        geglu = self.activation == "geglu"
        if self.x.element_size() == 4:
            # Float32 matmuls run without tensor cores, from registers.
            if geglu:
                return Config("tile", 32, 32, 32, 16, 8, 4, 2)
            return Config("tile", 32, next_power_of_2(self.features, most=64), 0, 16, 8, 4, 2)

        depth = self.x.shape[-1] + (0 if self.x2 is None else self.x2.shape[-1])
        rows, features = sample_rows(self.x), self.features

        def programs(tile: tuple[int, int, int, float]) -> int:
            block_m, block_n, block_n2, _ = tile
            return cdiv(rows, block_m) * cdiv(features, (block_n + block_n2) // (2 if geglu else 1))

        def time(tile: tuple[int, int, int, float], split_k: int = 1) -> float:
            block_m, block_n, block_n2, reach = tile
            waves = cdiv(programs(tile) * split_k, gpu.multiprocessors)
            merging = MERGE + MERGE_STEPS * rows * features / gpu.multiprocessors if split_k > 1 else 0
            return waves * block_m * (block_n + block_n2) / reach * depth / split_k + merging

        # Rows of whole 16-byte accesses are copied to shared memory asynchronously; others go through registers.
        copied = gpu.arch == 90 and all(t.shape[-1] % 16 == 0 for t in (self.x, self.x2) if t is not None)
        # The epilogue of the first tile has no registers left for more tensors.
        plain = self.residual is None and not isinstance(self, RowMoments)
        # Few kinds of tiles, for every kind is compiled once for every kind of prologue and epilogue.
        tiles = [t for t in TILES if t is not WIDEST and (not copied or geglu or t in HOPPER_TILES)]
        if copied and plain:
            tiles.append(WIDEST)
        tile = min((t for t in tiles if not geglu or t[2] == 0), key=time)
        block_m, block_n, block_n2, _ = tile
        if geglu:
            block_n = block_n2 = block_n // 2
        outputs = block_m * (block_n + block_n2)
        num_warps = 8 if outputs > 8192 else 4
        if copied:
            # Masks of a ragged last step cost less than twice as many steps. Programs that have a multiprocessor to
            # themselves hide the latency of their loads by what is under way.
            block_k, num_stages = (128, 4) if outputs <= 4096 else (32, 4) if tile is WIDEST else (64, 3)
            if self.can_split and depth % 128 == 0 and time(LARGE, 2) < time(tile):
                return Config("tile", *LARGE[:3], 64, 8, 8, 3, split_k=2)
            return Config("tile", block_m, block_n, block_n2, block_k, 8, num_warps, num_stages)
        # Masks of ragged steps take registers, and so do the matmuls of data-center Blackwell: then 64 would spill.
        even = all(t.shape[-1] % 64 == 0 for t in (self.x, self.x2) if t is not None)
        block_k = 64 if even and gpu.shared_limit > 128 << 10 and gpu.arch < 100 else 32
        # Without warpgroup instructions the operands of the largest tile are in registers too, and leave none for the
        # norm.
        if self.row_moments is not None and gpu.arch < 90 and outputs > 128 * 128:
            block_k = 32
        elif self.row_moments is not None and block_k == 64 and block_n2 == 32:
            num_warps = 4  # with eight the compiler keeps to 128 registers, for two programs, and spills
        return Config("tile", block_m, block_n, block_n2, block_k, 8, num_warps, 3)

    def plan(self, config: Config) -> Plan:
        """One launch; of the cuBLASLt backend several."""
        out = self.x.new_empty(self.out_shape)
        # The matmul runs in the widest dtype of its operands; networks give them all the same.
        dtype = widest_dtype(self.x, self.weight, self.x2, self.weight2)
        operands = {
            "x": contiguous_as(self.x),
            "weight": contiguous_as(self.weight, dtype),
            "x2": contiguous_as(self.x2),
            "weight2": contiguous_as(self.weight2, dtype),
            "bias": contiguous_as(self.bias),
            "residual": contiguous_as(self.residual),
            "gate": contiguous_as(self.gate),
            "out": out,
        }
        if config.form == "library":
            norm_eps = None if self.row_moments is None else self.eps
            return Plan(out, cublaslt.launches(operands, self.activation, norm_eps))
        if config.split_k > 1:
            return Plan(out, self._split(config, operands, out))
        return Plan(out, (self._launch(config, operands, out),))

    @property
    def can_split(self) -> bool:
        """Whether the launches of split-K compute it: no second product, nothing but sums before the epilogue."""
        return self.x2 is None and self.row_moments is None and self.activation != "geglu"

    def _split(self, config: Config, operands: dict[str, Tensor | None], out: Tensor) -> tuple[Launch, Launch]:
        """Partial sums, then their sum and the epilogue."""
        check(self.can_split, "split_k must be 1 for geglu, a second input or a norm")
        k, n = self.x.shape[-1], self.features
        rows = self.x.numel() // k
        k_per_split = cdiv(cdiv(k, config.block_k), config.split_k) * config.block_k
        splits = cdiv(k, k_per_split)
        partials = out.new_empty((splits, rows, n), dtype=torch.float32)
        sizes = {"M": rows, "N": n}
        product: dict[str, Any] = {
            "x": operands["x"],
            "weight": operands["weight"],
            "scratch_partials": partials,
            **sizes,
            "K": k,
            "k_per_split": k_per_split,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_N2": config.block_n2,
            "BLOCK_K": config.block_k,
            "EVEN_K": k % config.block_k == 0,
            "GROUP_M": config.group_m,
        }
        merged: dict[str, Any] = {
            "scratch_partials": partials,
            **{name: operands[name] for name in ("bias", "residual", "gate", "out")},
            "out_moments": out_moments(self, config, out),
            **sizes,
            "ACTIVATION": self.activation,
            "SPLIT_K": splits,
            "BLOCK_M": MERGED_ROWS,
            "BLOCK_N": MERGED_FEATURES,
            "PART": PART,
        }
        tiles = cdiv(rows, config.block_m) * cdiv(n, config.block_n + config.block_n2)
        grid = cdiv(rows, MERGED_ROWS), cdiv(n, MERGED_FEATURES)
        return (
            Launch(linear_kernel.linear_split, (tiles, splits), product, config.num_warps, config.num_stages),
            Launch(linear_kernel.merge_splits, grid, merged, 4, 1),
        )

    def _launch(self, config: Config, operands: dict[str, Tensor | None], out: Tensor) -> Launch:
        geglu = self.activation == "geglu"
        check(not geglu or config.block_n2 == config.block_n, "geglu needs a second block as wide as the first")
        k, k2 = self.x.shape[-1], 0 if self.x2 is None else self.x2.shape[-1]
        rows = self.x.numel() // k
        arguments: dict[str, Any] = {
            **operands,
            "row_moments": contiguous_as(self.row_moments),
            "weight_sums": contiguous_as(self.weight_sums),
            "out_moments": out_moments(self, config, out),
            "eps": self.eps,
            "M": rows,
            "N": self.features,
            "K": k,
            "K2": k2,
            "ACTIVATION": self.activation,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_N2": config.block_n2,
            "BLOCK_K": config.block_k,
            "EVEN_K": k % config.block_k == 0 and k2 % config.block_k == 0,
            "GROUP_M": config.group_m,
            "PART": PART,
            "PARTS": 0 if self.row_moments is None else cdiv(k, PART),
        }
        width = config.block_n if geglu else config.block_n + config.block_n2
        grid = (cdiv(rows, config.block_m) * cdiv(self.features, width),)
        return Launch(linear_kernel.linear, grid, arguments, config.num_warps, config.num_stages)

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """cuBLASLt; tiles of powers of two, or 1.5 times that, whose accumulators fit the registers of their warps."""
        yield LIBRARY
        itemsize = self.x.element_size()
        if self.activation == "geglu":
            widths = [(32, 32), (64, 64), (128, 128)]
        else:
            widths = [(32, 0), (64, 0), (128, 0), (256, 0), (64, 32), (128, 64)]
            widths += [(256, 32)] if gpu.arch == 90 else []
        for block_m, (block_n, block_n2), block_k, num_warps, num_stages, group_m in itertools.product(
            (32, 64, 128), widths, (32, 64, 128) if itemsize == 2 else (16, 32), (4, 8), (2, 3, 4), (4, 8)
        ):
            buffers = (block_m + block_n + block_n2) * block_k * itemsize * num_stages
            if block_m * (block_n + block_n2) <= 4608 * num_warps and buffers <= gpu.shared_limit:
                one = Config("tile", block_m, block_n, block_n2, block_k, group_m, num_warps, num_stages)
                yield one
                if self.can_split and num_warps == 8 and block_m == 128 and self.x.shape[-1] % (2 * block_k) == 0:
                    yield replace(one, split_k=2)


@register
class LinearRowMoments(RowMoments, Linear):
    """The same, and the statistics of the result's rows."""

    __slots__ = ()
    name = "linear_row_moments"


def sample_rows(x: Tensor) -> int:
    """Rows of one sample of x [...,K]: a configuration must not depend on the batch, or a result would."""
    return x.shape[-2] if x.dim() > 2 else 1024
