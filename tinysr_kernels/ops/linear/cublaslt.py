"""linear by the library: cuBLASLt where its epilogues reach, and as few kernels behind it as can be."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def kernels(given: Mapping[str, Tensor | None], activation: str) -> int:
    """How many kernels `linear` launches on a GPU for these arguments."""
    named = {name for name, t in given.items() if t is not None}
    count = 1 + ("x2" in named) + ("gate" in named)
    if activation == "geglu":
        return count + 2 + ("residual" in named)
    gelu_behind = activation == "gelu_tanh" and not _fuses_gelu(named)
    # The library adds one vector in its own epilogue; a residual is another pass.
    return count + gelu_behind + ("residual" in named)


def _fuses_gelu(named: set[str]) -> bool:
    return "bias" in named and "x2" not in named


def linear(
    x: Tensor,
    weight: Tensor,
    x2: Tensor | None,
    weight2: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    out: Tensor,
    activation: str,
) -> None:
    """residual + gate * act(x W^T + x2 W2^T + bias) into out, all of x's dtype; shapes as in ops/linear/linear.py."""
    rows = x.view(-1, x.shape[-1])
    result = out.view(-1, out.shape[-1])
    weight = weight.to(x.dtype)
    geglu = activation == "geglu"
    sums = x.new_empty(rows.shape[0], weight.shape[0]) if geglu else result
    fused = activation == "gelu_tanh" and bias is not None and x2 is None and x.is_cuda
    if fused:
        # On a GPU this GELU is the tanh approximation; on the CPU it is the exact one.
        torch.ops.aten._addmm_activation.out(_like(bias, x), rows, weight.T, use_gelu=True, out=sums)
    elif bias is not None:
        torch.addmm(_like(bias, x), rows, weight.T, out=sums)
    else:
        torch.mm(rows, weight.T, out=sums)
    if x2 is not None and weight2 is not None:
        sums.addmm_(x2.view(-1, x2.shape[-1]).to(x.dtype), weight2.to(x.dtype).T)
    if geglu:
        values, gates = sums.chunk(2, 1)
        torch.mul(values, F.gelu(gates), out=result)
    elif activation == "gelu_tanh" and not fused:
        result.copy_(F.gelu(sums, approximate="tanh"))
    if gate is not None:
        result.mul_(gate)
    if residual is not None:
        result.add_(residual.view(result.shape))


def _like(vector: Tensor | None, x: Tensor) -> Tensor:
    assert vector is not None
    return vector.to(x.dtype)
