"""joint_attention: attention over the tokens of an image and of a text together, as in SD3's blocks.

    per head: out = softmax(scale * q [k_image, k_text]^T) [v_image, v_text], for q of the image and of the text

Layouts: image [N,T,3*heads*d] holds q, k and v side by side; text [N,P,3*heads*d] too, or [1,P,...] where all samples
share it, or [...,P,2*heads*d] with k and v alone, where nobody asks for its queries. out [N*T+N*P,heads*d], or
[N*T,heads*d] without the text's queries, contiguous: the image's tokens of all samples, then the text's, so that either
stream is a contiguous view. Any d, T and P. Source: diffusers models/attention_processor.py, JointAttnProcessor2_0.
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
from tinysr_kernels.ops.attention.attention import WHOLE_TOKENS, head_blocks
from tinysr_kernels.ops.attention.kernels import joint_attention as kernels
from tinysr_kernels.ops.call import Cost, Operator, register
from tinysr_kernels.ops.checks import check, check_rank
from tinysr_kernels.ops.layout import contiguous_as, dtype_name, nbytes
from tinysr_kernels.ops.reference_math import compute_dtype


@dataclass(frozen=True)
class Config:
    """A launch of joint_attention. block_m and block_n: queries per program, keys per step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@register
@dataclass(slots=True, eq=False)
class JointAttention(Operator):
    """One attention over two streams; fields and mathematics as in the module's docstring."""

    name = "joint_attention"
    config = Config
    tuned_by = ("image", "text", "heads")

    image: Tensor
    text: Tensor
    heads: int
    scale: float

    @property
    def head_dim(self) -> int:
        """d, features per head."""
        return self.image.shape[2] // 3 // self.heads

    @property
    def queried(self) -> int:
        """P, the text's tokens that have queries: all or none."""
        return self.text.shape[1] if self.text.shape[2] == self.image.shape[2] else 0

    @property
    def out_shape(self) -> tuple[int, int]:
        """[N*T+N*P,heads*d] of the result."""
        n, tokens, features = self.image.shape
        return n * (tokens + self.queried), features // 3

    def check(self) -> None:
        """ValueError naming the argument, what was expected and what was found."""
        check(self.heads > 0, f"heads must be at least 1, found {self.heads}")
        check_rank("image", self.image, "N,T,3*heads*d")
        check_rank("text", self.text, "N,P,3*heads*d")
        n, _, features = self.image.shape
        fits = features % (3 * self.heads) == 0
        check(fits, f"image must be [N,T,3*{self.heads}*d], found {list(self.image.shape)}")
        samples, context, found = self.text.shape
        fits = samples in (1, n) and context > 0 and found in (features, features // 3 * 2)
        wanted = f"[{n} or 1, 1 or more, {features} or {features // 3 * 2}]"
        check(fits, f"text must be {wanted}, found {list(self.text.shape)}")

    def reference(self) -> Tensor:
        """PyTorch's scaled dot product attention in float32 or wider; any floating dtype."""
        return self._attended(compute_dtype(self.image.dtype))

    def library(self) -> Tensor:
        """PyTorch's scaled dot product attention in the image's dtype, on copies of both streams side by side."""
        return self._attended(self.image.dtype)

    def _attended(self, dtype: torch.dtype) -> Tensor:
        """The result, computed in a dtype."""
        n, tokens, _ = self.image.shape
        both = [contiguous_as(t, dtype).unflatten(2, (-1, self.heads, self.head_dim)) for t in (self.image, self.text)]
        image, text = (t.expand(n, -1, -1, -1, -1).permute(2, 0, 3, 1, 4) for t in both)
        k, v = (torch.cat([image[i], text[i - 3]], 2) for i in (1, 2))
        q = torch.cat([image[0], text[0]], 2) if self.queried else image[0]
        mixed = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        streams = [part.flatten(0, 1) for part in mixed.split([tokens, self.queried], 1)]
        return contiguous_as(torch.cat(streams), self.image.dtype)

    def empty(self) -> Tensor:
        """[N*T+N*P,heads*d], contiguous, of the image's dtype."""
        return self.image.new_empty(self.out_shape)

    def cost(self) -> Cost:
        """FLOPs of the two matmuls and 5 per score for the softmax; bytes of every tensor once."""
        rows, features = self.out_shape
        keys = self.image.shape[1] + self.text.shape[1]
        flops = rows * keys * (4 * features + 5 * self.heads)
        return Cost(flops, nbytes(*self.tensors) + rows * features * self.image.element_size())

    def bucket(self) -> str:
        """dtype, heads, tokens up to a power of two and whether they are whole tiles, the text's; for any batch."""
        tokens, context = self.image.shape[1], self.text.shape[1]
        tail = "" if tokens % WHOLE_TOKENS == 0 else " ragged"
        queries = "" if self.queried else " without queries"
        sizes = f"{self.heads}x{self.head_dim} {next_power_of_2(tokens)}{tail} {context}{queries}"
        return f"{dtype_name(self.image)} {sizes}"

    def heuristic(self, gpu: Gpu) -> Config:
        """As attention's, for any batch size."""
        if self.image.element_size() > 2 or self.head_dim > 128:
            # Without tensor cores both operands of a matmul lie in registers.
            return Config(16, 16, 4, 1) if self.head_dim > 128 else Config(32, 16, 4 if self.head_dim <= 64 else 8, 1)
        if self.head_dim > 64:
            return Config(64, 32, 8, 2)
        # On data-center Blackwell the larger tile would spill two words in Triton 3.6.
        large = self._tiles(128) * self.heads >= gpu.multiprocessors and gpu.arch < 100
        return Config(128, 64, 8, 3) if large else Config(64, 64, 4, 3)

    def _tiles(self, block_m: int) -> int:
        """Tiles of queries of both streams, none of which has queries of both."""
        return cdiv(self.image.shape[1], block_m) + cdiv(self.queried, block_m)

    def plan(self, config: Config) -> Plan:
        """One launch."""
        out = self.empty()
        n, tokens, _ = self.image.shape
        samples, context, _ = self.text.shape
        first, second = head_blocks(self.head_dim)
        arguments = {
            "image": contiguous_as(self.image),
            "text": contiguous_as(self.text, self.image.dtype),
            "out": out,
            "scale": abs(self.scale) * math.log2(math.e),
            "tokens": tokens,
            "context": context,
            "text_step": context if samples > 1 else 0,
            "heads": self.heads,
            "NEGATIVE": self.scale < 0,
            "QUERIES": self.queried > 0,
            "IMAGE_TAIL": tokens % config.block_n > 0,
            "TEXT_TAIL": context % config.block_n > 0,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D1": first,
            "BLOCK_D2": second,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "NUM_STAGES": config.num_stages,
        }
        grid = (self._tiles(config.block_m), self.heads, n)
        return Plan(out, (Launch(kernels.joint, grid, arguments, config.num_warps, config.num_stages),))

    def space(self, gpu: Gpu) -> Iterator[Config]:
        """Around the heuristic's; in half precision only, for heads of up to 128, more than one size."""
        yield self.heuristic(gpu)
        if self.image.element_size() == 2 and self.head_dim <= 128:
            for sizes in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
                yield Config(*sizes)
