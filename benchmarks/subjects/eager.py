"""An operator's call in eager PyTorch, the baseline: the same mathematics as separate operations, in the call's dtype.

Mostly the operator's reference, with compute_dtype disabled so that it does not compute in float32. Where public code
differs from the reference, the public form: nearest upsampling and a 3x3 convolution, PyTorch's GroupNorm. The channel
statistics that our kernels also return are not computed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinysr_kernels.ops import REGISTRY, Operator
from tinysr_kernels.ops.layout import nhwc

SUFFIXES = ("_moments", "_row_moments")


@contextlib.contextmanager
def in_own_dtype() -> Iterator[None]:
    """Within, references compute in the dtype of their inputs."""
    modules = [vars(module) for name, module in sys.modules.items() if name.startswith("tinysr_kernels.ops.")]
    kept = [(names, names["compute_dtype"]) for names in modules if "compute_dtype" in names]
    try:
        for names, _ in kept:
            names["compute_dtype"] = _same
        yield
    finally:
        for names, original in kept:
            names["compute_dtype"] = original


def _same(dtype: torch.dtype) -> torch.dtype:
    return dtype


def has_eager(op: str) -> bool:
    """Whether eager PyTorch can express the operator; not for fp8 with per-row scales."""
    return "fp8" not in op and "quantize" not in op


def base_of(op: str) -> str:
    """The operator's name without the suffix for also returning statistics."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if op.endswith(suffix) and op.removesuffix(suffix) in REGISTRY:
            return op.removesuffix(suffix)
    return op


def eager(call: Operator) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The eager function of the call's operator, and its arguments for this call.

    Float32 vectors are cast to the activations' dtype, in which eager networks keep them.
    """
    name = base_of(call.name)
    dtype = call.first.dtype if call.first.is_floating_point() else torch.float32
    own = {
        k: v.to(dtype) if isinstance(v, Tensor) and v.dtype == torch.float32 else v for k, v in call.arguments.items()
    }
    if name == "upsample_conv":
        # A dense kernel of the same size; its values do not affect the timing.
        own["weight"] = nhwc(F.pad(own.pop("phases")[0], (0, 1, 0, 1)))
        return _upsample_conv, own
    if name == "group_norm":
        return _group_norm, {k: v for k, v in own.items() if not k.endswith("moments")}
    return functools.partial(_reference, REGISTRY[name]), own


def _reference(operator: type[Operator], **inputs: Any) -> Any:
    return operator(**inputs).reference()


def _upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    y = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    return torch.relu(y) if activation == "relu" else y


def _group_norm(
    x: Tensor, skip: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
) -> Tensor:
    y = torch.group_norm(x if skip is None else torch.cat([x, skip], 1), groups, weight, bias, eps)
    return F.silu(y) if silu else y
