"""unpatchify_subtract: the projection of tokens to patches, laid out as an image and subtracted from the latent.

    out[n,c,y*p+i,x*p+j] = z[n,c,y*p+i,x*p+j] - (t @ weight.T + bias)[n, y*w+x, (i*p+j)*C+c]

N x (h*w) tokens become p x p patches of C channels: SD3's proj_out and unpatchify (order nhwpqc -> nchpwq) and
TinySR's z - transformer(z) at once. With row_moments [N,h*w,2,ceil(D/32)] of t and weight_sums [p*p*C], t goes through
a LayerNorm first, as in ops/linear/linear.py. Layouts: t [N,h*w,D], weight [p*p*C,D], bias [p*p*C], z [N,C,h*p,w*p] of
any strides, out channels_last.
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
from tinysr_kernels.ops.checks import check, check_rank, check_shape
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, empty_nhwc, nbytes, nhwc, widest_dtype
from tinysr_kernels.ops.linear.kernels import linear as linear_kernel
from tinysr_kernels.ops.linear.linear import Linear
from tinysr_kernels.ops.norm.row_moments import PART, check_row_moments
from tinysr_kernels.ops.reference_math import compute_dtype


@dataclass(frozen=True)
class Config:
    """A launch of unpatchify_subtract: tokens and features per program, elements of the reduction per step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@register
@dataclass(slots=True, eq=False)
class UnpatchifySubtract(Operator):
    """One projection and subtraction; fields and mathematics as in the module's docstring."""

    name = "unpatchify_subtract"
    config = Config
    tuned_by = ("t", "weight")

    t: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor
    patch_size: int
    row_moments: Tensor | None = None
    weight_sums: Tensor | None = None
    eps: float = 0.0

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        t, z, p = self.t, self.z, self.patch_size
        check_rank("z", z, "N,C,H,W")
        check_rank("t", t, "N,T,D")
        check(p >= 1, f"patch_size must be at least 1, found {p}")
        n, c, h, w = z.shape
        check(h % p == 0 and w % p == 0, f"z must be a multiple of the patch size {p} per side, found {h}x{w}")
        check_shape("t", t, (n, (h // p) * (w // p), t.shape[2]))
        check_shape("weight", self.weight, (p * p * c, t.shape[2]))
        check_shape("bias", self.bias, (p * p * c,))
        check_row_moments(t, p * p * c, self.row_moments, self.weight_sums)

    def reference(self) -> Tensor:
        """Plain PyTorch, in float32 or wider; any floating dtype, the result has z's."""
        dtype = compute_dtype(self.t.dtype)
        return self._subtracted(self._projection(dtype).reference(), dtype)

    def library(self) -> Tensor:
        """linear's library form, subtracted in z's dtype."""
        return self._subtracted(self._projection(self.t.dtype).library(), self.z.dtype)

    def _projection(self, dtype: torch.dtype) -> Linear:
        """The matmul in a dtype."""
        return Linear(
            self.t.to(dtype),
            self.weight.to(dtype),
            self.bias,
            row_moments=self.row_moments,
            weight_sums=self.weight_sums,
            eps=self.eps,
        )

    def _subtracted(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """z - image, computed in a dtype; the image's patches are the tokens [N,h*w,p*p*C]."""
        n, c, h, w = self.z.shape
        p = self.patch_size
        patches = tokens.view(n, h // p, w // p, p, p, c)
        image = patches.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        return nhwc((self.z.to(dtype) - image).to(self.z.dtype))

    def empty(self) -> Tensor:
        """[N,C,h*p,w*p] in channels_last memory, of z's dtype."""
        return empty_nhwc(self.z, tuple(self.z.shape))

    def cost(self) -> Cost:
        """FLOPs of the matmul; bytes of every tensor once."""
        flops = 2 * self.t.shape[0] * self.t.shape[1] * self.weight.numel()
        return Cost(flops, nbytes(*self.tensors) + self.z.numel() * self.z.element_size())

    def bucket(self) -> str:
        """dtype, D, weight's rows, tokens of a sample up to a power of two."""
        _, tokens, depth = self.t.shape
        return f"{dtype_name(self.t)} {depth}->{self.weight.shape[0]} {next_power_of_2(tokens)}"

    def heuristic(self, gpu: Gpu) -> Config:
        """Small tiles: the matmul has few features, and enough programs are needed."""
        half = self.t.element_size() == 2
        block_n = next_power_of_2(self.weight.shape[0], most=32)
        return Config(16, block_n, 64 if half else 16, 4, 3 if half else 2)

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out = self.empty()
        n, tokens, depth = self.t.shape
        arguments = {
            "t": contiguous_as(self.t),
            "weight": contiguous_as(self.weight, widest_dtype(self.t, self.weight)),
            "bias": contiguous_as(self.bias),
            "z": nhwc(self.z),
            "out": out,
            "row_moments": contiguous_as(self.row_moments),
            "weight_sums": contiguous_as(self.weight_sums),
            "eps": self.eps,
            "M": n * tokens,
            "across": self.z.shape[3] // self.patch_size,
            "K": depth,
            "CHANNELS": self.z.shape[1],
            "PATCH": self.patch_size,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "EVEN_K": depth % config.block_k == 0,
            "PART": PART,
            "PARTS": 0 if self.row_moments is None else cdiv(depth, PART),
        }
        grid = (cdiv(n * tokens, config.block_m), cdiv(self.weight.shape[0], config.block_n))
        kernel = linear_kernel.unpatchify_subtract
        return Plan(out, (Launch(kernel, grid, arguments, config.num_warps, config.num_stages),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """Tiles of few rows, whose buffers fit the shared memory."""
        itemsize = self.t.element_size()
        for block_m, columns, block_k, num_warps, num_stages in itertools.product(
            (16, 32, 64), (16, 32, 64), (32, 64, 128) if itemsize == 2 else (16, 32), (2, 4), (2, 3, 4)
        ):
            block_n = next_power_of_2(self.weight.shape[0], most=columns)
            if (block_m + block_n) * block_k * itemsize * num_stages <= gpu.shared_limit:
                yield Config(block_m, block_n, block_k, num_warps, num_stages)
