"""patch_embed: non-overlapping patches of a latent, projected to tokens, plus the position table.

    out[n, y*w+x, d] = table[y*w+x, d] + sum_{c,i,j} weight[d,c,i,j] * z[n,c,y*p+i,x*p+j]

Layouts: z [N,C,H,W], weight [D,C,p,p], table [h*w,D] with h = H/p, w = W/p (the convolution's bias is folded
into it), out [N,h*w,D] contiguous. SD3's PatchEmbed with a fixed table.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import Cost, check, check_rank, check_shape, plain, register, size, wide

SCHEMA = "patch_embed(Tensor z, Tensor weight, Tensor table) -> Tensor"


def _out_shape(z: Tensor, weight: Tensor, table: Tensor) -> tuple[int, int, int]:
    check_rank("z", z, "N,C,H,W")
    check_rank("weight", weight, "D,C,p,p")
    n, c, h, w = z.shape
    d, p = weight.shape[0], weight.shape[2]
    check_shape("weight", weight, (d, c, p, p))
    check(h % p == 0 and w % p == 0, f"z must be a multiple of the patch size {p} per side, found {h}x{w}")
    tokens = (h // p) * (w // p)
    check_shape("table", table, (tokens, d))
    return n, tokens, d


def reference(z: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Plain PyTorch, in float32 or wider; shapes and mathematics as in the module's docstring.

    Any floating dtype; the result has z's. Raises ValueError naming argument, expected and found.
    """
    _out_shape(z, weight, table)
    dtype = wide(z.dtype)
    patches = F.conv2d(plain(z, dtype), plain(weight, dtype), stride=weight.shape[2])
    return plain(patches.flatten(2).transpose(1, 2) + table.to(dtype), z.dtype)


def fake(z: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return z.new_empty(_out_shape(z, weight, table))


def cost(z: Tensor, weight: Tensor, table: Tensor) -> Cost:
    """FLOPs of the projection; bytes of every tensor once."""
    n, tokens, d = _out_shape(z, weight, table)
    flops = 2 * n * tokens * weight.numel()
    return Cost(flops, size(z, weight, table) + n * tokens * d * z.element_size())


patch_embed = register(SCHEMA, reference, fake, cost)
