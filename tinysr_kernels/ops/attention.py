"""attention: non-causal multi-head self-attention over an interleaved qkv tensor.

    [q, k, v] = qkv in thirds of the last dimension; per head: out = softmax(scale * q k^T) v

Layouts: qkv [N,T,3*heads*d], out [N,T,heads*d] contiguous, heads side by side in the last dimension.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops.registry import Cost, check, check_rank, plain, register, size, wide

SCHEMA = "attention(Tensor qkv, int heads, float scale) -> Tensor"


def _out_shape(qkv: Tensor, heads: int) -> tuple[int, int, int]:
    check(heads > 0, f"heads must be at least 1, found {heads}")
    check_rank("qkv", qkv, "N,T,3*heads*d")
    check(qkv.shape[2] % (3 * heads) == 0, f"qkv must be [N,T,3*{heads}*d], found {list(qkv.shape)}")
    return qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3


def reference(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """PyTorch's scaled dot product attention in float32 or wider; shapes as in the module's docstring.

    Any floating dtype; the result has qkv's. Raises ValueError when qkv does not divide into 3 * heads.
    """
    n, tokens, features = _out_shape(qkv, heads)
    wide_qkv = plain(qkv, wide(qkv.dtype)).view(n, tokens, 3, heads, features // heads)
    q, k, v = wide_qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return plain(out.transpose(1, 2).reshape(n, tokens, features), qkv.dtype)


def fake(qkv: Tensor, heads: int, scale: float) -> Tensor:
    """An uninitialised result of the true shape, dtype and strides; raises what the reference raises."""
    return qkv.new_empty(_out_shape(qkv, heads))


def cost(qkv: Tensor, heads: int, scale: float) -> Cost:
    """FLOPs of the two products and 5 per score for the softmax; bytes of qkv and the result once."""
    n, tokens, features = _out_shape(qkv, heads)
    flops = n * tokens * tokens * (4 * features + 5 * heads)
    return Cost(flops, size(qkv) + n * tokens * features * qkv.element_size())


attention = register(SCHEMA, reference, fake, cost)
