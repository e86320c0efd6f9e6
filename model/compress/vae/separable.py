"""Dense 3x3 convolutions as depthwise 3x3 times pointwise 1x1, initialized by the best approximation.

W[o,c,:,:] ~ P[o,c] D[c,:,:]: for each input channel c the matrix [O,9] of its kernels is replaced by its best matrix of
rank one, the leading term of its singular value decomposition (Eckart and Young 1936). The squared error of the whole
kernel is the sum of the channels' errors, so taking the best for each channel is the best altogether.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor


def separate(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Kernel [O,I,3,3] -> depthwise [I,1,3,3] and pointwise [O,I,1,1] of the weight's dtype, computed in float64.

    The two factors of a channel have equal norms, so that neither learns faster than the other.
    """
    outputs, inputs, height, width = weight.shape
    kernels = weight.double().permute(1, 0, 2, 3).reshape(inputs, outputs, height * width)
    u, s, v = torch.linalg.svd(kernels, full_matrices=False)
    root = s[:, 0].sqrt()[:, None]
    depthwise = (v[:, 0] * root).reshape(inputs, 1, height, width)
    pointwise = (u[:, :, 0] * root).T[:, :, None, None]
    return depthwise.to(weight.dtype).contiguous(), pointwise.to(weight.dtype).contiguous()


def dense_of(depthwise: Tensor, pointwise: Tensor) -> Tensor:
    """The dense kernel [O,I,3,3] that a separable convolution computes."""
    return pointwise * depthwise[:, 0][None]


def separable_state(state: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
    """A state dict with every dense 3x3 convolution separable, but for those (by name, without `.weight`) in `keep`.

    Other tensors stay as they are; a bias becomes the pointwise convolution's.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, _, part = name.rpartition(".")
        weight = state.get(f"{module}.weight")
        dense = weight is not None and weight.ndim == 4 and weight.shape[2:] == (3, 3) and weight.shape[1] > 1
        if not dense or module in keep or module.endswith(".depthwise"):
            out[name] = tensor
        elif part == "weight":
            out[f"{module}.depthwise.weight"], out[f"{module}.pointwise.weight"] = separate(tensor)
        else:
            out[f"{module}.pointwise.{part}"] = tensor
    return out
