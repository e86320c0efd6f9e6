"""Modules shared by the compiled networks. Each holds folded tensors as buffers and calls one operator."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import tinysr_kernels.ops  # noqa: F401  (registers torch.ops.tinysr)

Folded = Mapping[str, Tensor]
ops = torch.ops.tinysr


class Layer(nn.Module):
    """A module whose buffers are the tensors `prefix.<name>` of a folded checkpoint; absent optional ones are None."""

    def __init__(self, folded: Folded, prefix: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name in required:
            self.register_buffer(name, folded[f"{prefix}.{name}"])
        for name in optional:
            self.register_buffer(name, folded.get(f"{prefix}.{name}"))


class Conv(Layer):
    """A 3x3 convolution, dense or separable as the tensors say; `upsample` puts a nearest x2 enlargement before it."""

    bias: Tensor | None
    shortcut_weight: Tensor | None

    def __init__(self, folded: Folded, prefix: str, *, stride: int = 1, upsample: bool = False) -> None:
        self_kinds = {"separable": ("depthwise", "pointwise"), "phases": ("phases",), "dense": ("weight",)}
        kind = "dense"
        if f"{prefix}.depthwise" in folded:
            kind = "separable"
        elif upsample:
            kind = "phases"
        super().__init__(folded, prefix, self_kinds[kind], ("bias", "shortcut_weight"))
        self.kind = kind
        self.stride = stride
        self.upsample = upsample

    def forward(
        self,
        x: Tensor,
        *,
        activation: str = "none",
        residual: Tensor | None = None,
        shortcut: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Tensor:
        """act(conv(x) + shortcut_1x1(concat(shortcut, skip)) + bias + residual) on [N,C,H,W]."""
        if self.kind == "phases":
            return ops.upsample_conv(x, self.phases, self.bias, activation)
        if self.shortcut_weight is None:
            shortcut = skip = None
        extra = (self.bias, residual, shortcut, skip, self.shortcut_weight, self.stride)
        if self.kind == "separable":
            return ops.sepconv(x, self.depthwise, self.pointwise, *extra, self.upsample, activation)
        return ops.conv3x3(x, self.weight, *extra, activation)


class InputConv(Layer):
    """The first convolution, on the image itself, with a constant border."""

    weight: Tensor

    def __init__(self, folded: Folded, prefix: str, *, stride: int = 1, border: float = 0.0) -> None:
        super().__init__(folded, prefix, ("weight", "bias"))
        self.stride = stride
        self.border = border

    def forward(self, image: Tensor) -> Tensor:
        """[N,3,H,W] -> [N,O,H/stride,W/stride]."""
        return ops.input_conv(image, self.weight, self.bias, self.stride, self.stride, self.border)


class GroupNorm(Layer):
    """GroupNorm, with SiLU on request, of one tensor or of the concatenation of two."""

    weight: Tensor

    def __init__(self, folded: Folded, prefix: str, groups: tuple[int, ...], eps: float, *, silu: bool = True) -> None:
        super().__init__(folded, prefix, ("weight", "bias"))
        self.groups = next(g for g in groups if self.weight.shape[0] % g == 0)
        self.eps = eps
        self.silu = silu

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """[N,C1,H,W] and [N,C2,H,W] -> [N,C1+C2,H,W]."""
        return ops.group_norm(x, skip, self.weight, self.bias, self.groups, self.eps, self.silu)


class Linear(Layer):
    """A linear layer with its epilogue; `gate` is there where folding it would lose digits in half precision."""

    weight: Tensor

    def __init__(self, folded: Folded, prefix: str, activation: str = "none") -> None:
        super().__init__(folded, prefix, ("weight", "bias"), ("gate", "weight2"))
        self.activation = activation

    def forward(self, x: Tensor, residual: Tensor | None = None, x2: Tensor | None = None) -> Tensor:
        """residual + gate * act(x W^T + x2 W2^T + bias) on [...,K]."""
        return ops.linear(x, self.weight, self.bias, residual, self.gate, self.activation, x2, self.weight2)


def tokens(x: Tensor) -> Tensor:
    """[N,C,H,W] in channels_last memory -> [N,H*W,C], a view."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w, c)


def untokens(t: Tensor, height: int, width: int) -> Tensor:
    """[N,H*W,C] -> [N,C,H,W] in channels_last memory, a view."""
    return t.view(t.shape[0], height, width, t.shape[2]).permute(0, 3, 1, 2)


def count(names: Mapping[str, object], prefix: str) -> int:
    """How many of `prefix.0.`, `prefix.1.`, ... occur among the names, without gaps."""
    found = {name[len(prefix) + 1 :].split(".", 1)[0] for name in names if name.startswith(f"{prefix}.")}
    n = 0
    while str(n) in found:
        n += 1
    return n
