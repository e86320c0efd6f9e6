"""Modules shared by the compiled networks. Each holds folded tensors as buffers and calls one operator."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tinysr_kernels.ops  # noqa: F401  (registers torch.ops.tinysr)
from tinysr_kernels.launch.backend import statistics_pay
from tinysr_kernels.ops.conv.conv_few import MAX_OUTPUTS
from tinysr_kernels.ops.norm.group_norm import splits
from tinysr_kernels.ops.trace import unrecorded

Folded = Mapping[str, Tensor]
Rows = tuple[Tensor, Tensor | None]
"""Tokens [N,T,D] that go to a LayerNorm next, and their row statistics [N,T,2,ceil(D/32)] where these pay."""
ops = torch.ops.tinysr


class Features(NamedTuple):
    """An image [N,C,H,W], and what its producer also returned for the GroupNorm that follows.

    moments: channel statistics of the image [N,2,C]; normed: the result of that GroupNorm itself.
    """

    image: Tensor
    moments: Tensor | None = None
    normed: Tensor | None = None


class Layer(nn.Module):
    """A module whose buffers are the tensors `prefix.<name>` of a folded checkpoint; absent optional ones are None."""

    def __init__(self, folded: Folded, prefix: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
        super().__init__()
        for name in required:
            self.register_buffer(name, folded[f"{prefix}.{name}"])
        for name in optional:
            self.register_buffer(name, folded.get(f"{prefix}.{name}"))


class Conv(Layer):
    """A 3x3 convolution, dense or separable depending on the tensors; `upsample`: nearest x2 before it.

    one_sided: zeros only on the right and the bottom, where the stride is 2.
    """

    bias: Tensor | None
    shortcut_weight: Tensor | None

    def __init__(
        self, folded: Folded, prefix: str, *, stride: int = 1, upsample: bool = False, one_sided: bool = False
    ) -> None:
        self_kinds = {"separable": ("depthwise", "pointwise"), "phases": ("phases",), "dense": ("weight",)}
        kind = "dense"
        if f"{prefix}.depthwise" in folded:
            kind = "separable"
        elif upsample:
            kind = "phases"
        super().__init__(folded, prefix, self_kinds[kind], ("bias", "shortcut_weight"))
        self.kind = kind
        self.stride = stride
        self.one_sided = one_sided
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
        found: Tensor = self._call("", x, residual, shortcut, skip, activation=activation)
        return found

    def features(
        self,
        x: Tensor,
        groups: tuple[int, ...],
        *,
        next_norm: GroupNorm | None = None,
        next_skip: Tensor | None = None,
        moments: bool = False,
        residual: Tensor | None = None,
        shortcut: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Features:
        """The same without activation, and statistics or the result of the GroupNorm that follows.

        groups: candidates for the number of groups; the first that divides the channels is used. next_norm: that
        GroupNorm, if known; next_skip: the image it concatenates. moments: ask for channel statistics. A dense
        convolution fuses next_norm, unless the concatenation is so large that a separate launch is better, or moments
        are asked for. A separable one returns statistics if GroupNorm would otherwise read its result twice. Where
        statistics do not pay, nothing is fused.
        """
        rest = (x, residual, shortcut, skip)
        if not statistics_pay():
            return Features(self._call("", *rest))
        pixels = x.shape[2] * x.shape[3] * (4 if self.upsample else 1) // self.stride**2
        outputs = self.outputs
        large = splits(pixels, outputs // group_count(groups, outputs))
        if self.kind == "separable" or (moments and large):
            return Features(*self._call("_moments", *rest)) if large else Features(self._call("", *rest))
        if next_norm is None or (next_skip is not None and splits(pixels, next_norm.width)):
            return Features(self._call("", *rest))
        norm = next_norm.arguments("normed")
        image, normed = self._call("_norm", *rest, **norm, normed_silu=next_norm.silu, normed_skip=next_skip)
        return Features(image, None, normed)

    def cropped(self, x: Tensor, height: int, width: int) -> Tensor:
        """The convolution of the nearest x2 enlargement's first rows and columns: [N,C,H,W] -> [N,O,height,width].

        Its zero padding lies at the crop, so that the last row and column are no phases of the low resolution.
        The 3x3 kernel is recovered from the phases: few images need it, and it is as large as half of them.
        """
        enlarged = F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, :height, :width]
        found: Tensor = ops.conv3x3(enlarged, unphased(self.get_buffer("phases")), self.bias)
        return found

    @property
    def can_fuse_norm(self) -> bool:
        """Whether a GroupNorm of its input can be its prologue at no further cost."""
        return self.kind == "dense" and self.stride == 1 and self.outputs <= MAX_OUTPUTS

    def with_norm(self, norm: GroupNorm, x: Features, *, residual: Tensor | None = None) -> Tensor:
        """conv(norm(x)) + bias + residual."""
        if x.moments is None or not (self.can_fuse_norm and norm.silu):
            return self(norm(x), residual=residual)
        before = norm.arguments("norm")
        found: Tensor = ops.conv3x3(
            x.image, self.weight, self.bias, residual=residual, norm_moments=x.moments, **before
        )
        return found

    @property
    def outputs(self) -> int:
        """Channels of the result."""
        name, axis = {"phases": ("phases", 1), "separable": ("pointwise", 0), "dense": ("weight", 0)}[self.kind]
        return self.get_buffer(name).shape[axis]

    def _call(
        self,
        variant: str,
        x: Tensor,
        residual: Tensor | None,
        shortcut: Tensor | None,
        skip: Tensor | None,
        **options: Any,
    ) -> Any:
        """The operator with this suffix; options: activation, and the arguments that `_norm` has besides."""
        if self.kind == "phases":
            operator = getattr(ops, f"upsample_conv{variant}")
            return operator(x, self.phases, self.bias, **options)
        options |= {"bias": self.bias, "residual": residual, "stride": self.stride}
        if self.shortcut_weight is not None:
            options |= {"shortcut": shortcut, "skip": skip, "shortcut_weight": self.shortcut_weight}
        if self.kind == "separable":
            operator = getattr(ops, f"sepconv{variant}")
            return operator(x, self.depthwise, self.pointwise, upsample=self.upsample, **options)
        operator = getattr(ops, f"conv3x3{variant}")
        if self.one_sided:
            options["one_sided"] = True
        return operator(x, self.weight, **options)


def unphased(phases: Tensor) -> Tensor:
    """The 3x3 kernel [O,C,3,3], channels last in memory, whose phases (`phase_weights`) are these [4,O,C,2,2]."""
    outputs, channels = phases.shape[1:3]
    taps = phases.permute(1, 0, 3, 4, 2).reshape(outputs, 16, channels)
    kernel = torch.matmul(_unphasing(phases.dtype, phases.device), taps)
    return kernel.view(outputs, 3, 3, channels).permute(0, 3, 1, 2)


@functools.cache
def _unphasing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[9,16]: taps of the kernel from those of its phases.

    Along an axis the taps of the phases are w0, w1 + w2 and w0 + w1, w2, so that w1 = (w1 + w2) - w2. Made once, for
    captured graphs read it, and not recorded (`ops/trace.py`).
    """
    with unrecorded():
        axis = torch.tensor([[1, 0, 0, 0], [0, 1, 0, -1], [0, 0, 0, 1]], dtype=torch.float32, device="cpu").view(
            3, 2, 2
        )
        return torch.einsum("kpi,lqj->klpqij", axis, axis).reshape(9, 16).to(device, dtype)


class WideConv(Layer):
    """A 3x3 convolution in float32 or wider, whatever the network's dtype: latents tolerate little rounding."""

    wide: Tensor
    bias: Tensor

    def __init__(self, folded: Folded, prefix: str) -> None:
        super().__init__(folded, prefix, ("wide", "bias"))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """conv(x) + bias + residual; x [N,C,H,W] of any dtype, the residual and the result of the weight's."""
        found: Tensor = ops.conv3x3(x.to(self.wide.dtype), self.wide, self.bias, residual=residual)
        return found


class InputConv(Layer):
    """The first convolution, on an image or a latent of any dtype, with a constant border."""

    weight: Tensor

    def __init__(self, folded: Folded, prefix: str, *, stride: int = 1, border: float = 0.0) -> None:
        super().__init__(folded, prefix, ("weight", "bias"))
        self.stride = stride
        self.border = border

    def forward(self, image: Tensor) -> Tensor:
        """[N,C,H,W] -> [N,O,H/stride,W/stride]."""
        return ops.input_conv(
            image, self.weight, self.bias, stride=self.stride, padding=self.stride, border=self.border
        )


class GroupNorm(Layer):
    """GroupNorm, optionally with SiLU, of one tensor or of the concatenation of two."""

    weight: Tensor
    bias: Tensor

    def __init__(self, folded: Folded, prefix: str, groups: tuple[int, ...], eps: float, *, silu: bool = True) -> None:
        super().__init__(folded, prefix, ("weight", "bias"))
        self.groups = group_count(groups, self.weight.shape[0])
        self.eps = eps
        self.silu = silu

    @property
    def width(self) -> int:
        """Channels per group."""
        return self.weight.shape[0] // self.groups

    def arguments(self, prefix: str) -> dict[str, Any]:
        """weight, bias, groups and eps by a convolution's names for them: the prefix is "norm" or "normed"."""
        named = {"weight": self.weight, "bias": self.bias, "groups": self.groups, "eps": self.eps}
        return {f"{prefix}_{name}": value for name, value in named.items()}

    def forward(self, x: Features, skip: Features | None = None) -> Tensor:
        """[N,C1,H,W] and [N,C2,H,W] -> [N,C1+C2,H,W]; `x.normed` unchanged if x's producer has normalized already."""
        image, moments, normed = x
        if normed is not None:
            return normed
        other, others, _ = skip or (None, None, None)
        if other is not None and (moments is None or others is None):
            moments = others = None
        affine = (self.weight, self.bias, self.groups, self.eps)
        return ops.group_norm(image, other, *affine, silu=self.silu, moments=moments, skip_moments=others)


class Linear(Layer):
    """A linear layer with its epilogue; `gate` exists if folding it would lose digits in half precision.

    norm_eps: eps of the LayerNorm (without affine part) before it, None if there is none.
    """

    weight: Tensor
    weight_sums: Tensor | None

    def __init__(self, folded: Folded, prefix: str, activation: str = "none", *, norm_eps: float | None = None) -> None:
        super().__init__(folded, prefix, ("weight", "bias"), ("gate", "weight2"))
        self.activation = activation
        self.norm_eps = norm_eps or 0.0
        self.register_buffer("weight_sums", None if norm_eps is None else row_sums(self.weight))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        x2: Tensor | None = None,
        row_moments: Tensor | None = None,
    ) -> Tensor:
        """residual + gate * act(norm(x) W^T + x2 W2^T + bias) on [...,K]; norm takes x's row_moments, if given."""
        if self.weight_sums is not None and row_moments is None:
            x = ops.layer_norm(x, self.norm_eps)
        found: Tensor = ops.linear(x, self.weight, **self._options(residual, x2, row_moments))
        return found

    def with_row_moments(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        x2: Tensor | None = None,
        row_moments: Tensor | None = None,
    ) -> Rows:
        """The same, and row statistics of the result for the LayerNorm that follows, where they pay."""
        if not statistics_pay():
            return self(x, residual, x2, row_moments), None
        out, moments = ops.linear_row_moments(x, self.weight, **self._options(residual, x2, row_moments))
        return out, moments

    def _options(self, residual: Tensor | None, x2: Tensor | None, row_moments: Tensor | None) -> dict[str, Any]:
        """The optional arguments of the operator."""
        second = {"x2": x2, "weight2": self.weight2}
        sums = None if row_moments is None else self.weight_sums
        norm = {"row_moments": row_moments, "weight_sums": sums, "eps": self.norm_eps}
        return {
            "bias": self.bias,
            "residual": residual,
            "gate": self.gate,
            "activation": self.activation,
            **second,
            **norm,
        }


def row_sums(weight: Tensor) -> Tensor:
    """Row sums of a matrix as it is stored, in float32 or wider."""
    return weight.double().sum(1).to(torch.promote_types(weight.dtype, torch.float32))


def group_count(groups: tuple[int, ...], channels: int) -> int:
    """The first number of groups that divides the channels."""
    return next(g for g in groups if channels % g == 0)


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
