"""linear by the cuBLASLt backend: its epilogues as far as they reach, then as few kernels as possible."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.launch.device import gpu_of
from tinysr_kernels.launch.plan import Launch, Library
from tinysr_kernels.ops.norm.layer_norm import LayerNorm

Operands = Mapping[str, Tensor | None]
"""The tensors among `linear`'s arguments by name, dense in memory, None for those not given."""


def launches(operands: Operands, activation: str, eps: float | None) -> tuple[Launch | Library, ...]:
    """cuBLASLt's matmul and what follows it; eps: of the LayerNorm before it, by a kernel of ours; None without one."""
    x = operands["x"]
    assert x is not None
    before: tuple[Launch | Library, ...] = ()
    if eps is not None:
        call = LayerNorm(x, eps)
        norm = call.plan(call.heuristic(gpu_of(x)))
        before, operands = norm.launches, {**operands, "x": norm.result}
    return (*before, Library(linear, {**operands, "activation": activation}, kernel_count(operands, activation)))


def kernel_count(operands: Operands, activation: str) -> int:
    """How many kernels `linear` launches on a GPU for these arguments."""
    count = 1 + sum(operands[name] is not None for name in ("x2", "gate", "residual"))
    if activation == "geglu":
        return count + 2
    # cuBLASLt's own epilogue adds the bias, and applies GELU if the accumulators are complete by then.
    gelu_after = activation == "gelu_tanh" and (operands["bias"] is None or operands["x2"] is not None)
    return count + gelu_after


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
    v = x.new_empty(rows.shape[0], weight.shape[0]) if geglu else result
    fused = activation == "gelu_tanh" and bias is not None and x2 is None and x.is_cuda
    if fused:
        # On a GPU this GELU is the tanh approximation; on the CPU it is the exact one.
        torch.ops.aten._addmm_activation.out(_like(bias, x), rows, weight.T, use_gelu=True, out=v)
    elif bias is not None:
        torch.addmm(_like(bias, x), rows, weight.T, out=v)
    else:
        torch.mm(rows, weight.T, out=v)
    if x2 is not None and weight2 is not None:
        v.addmm_(x2.view(-1, x2.shape[-1]).to(x.dtype), weight2.to(x.dtype).T)
    if geglu:
        values, gates = v.chunk(2, 1)
        torch.mul(values, F.gelu(gates), out=result)
    elif activation == "gelu_tanh" and not fused:
        result.copy_(F.gelu(v, approximate="tanh"))
    if gate is not None:
        result.mul_(gate)
    if residual is not None:
        result.add_(residual.view(result.shape))


def _like(vector: Tensor | None, x: Tensor) -> Tensor:
    assert vector is not None
    return vector.to(x.dtype)
