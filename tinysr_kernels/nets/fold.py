"""Folding constants into weights at load time: the pieces every family uses.

Everything is computed in float64 and rounded once: matrices to the network's dtype, vectors (biases, norm weights,
position tables, depthwise taps) to float32 or wider, because kernels add them in float32 anyway.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tinysr_kernels.ops.conv.upsample_conv import phase_weights
from tinysr_kernels.ops.linear.quantize import E4M3

SMALLEST_ROW = 6e-5
"""A gate is folded only while every row of the product keeps at least this root mean square: below it, float16
subnormals lose digits (measured: relative error 8.5e-3 at gates of 1e-4). The rule does not depend on the dtype, so
that one folded file serves all of them."""


PIECE = 64
"""Output channels that are folded at once where that saves memory."""
VECTORS = (".table", ".depthwise", ".wide")
"""Endings of the names of folded tensors that stay in float32 or wider although they have several dimensions."""


def place(folded: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Folded tensors for one device and compute dtype.

    Matrices and kernels come in `dtype`; vectors (biases, norm weights, gates, scales, position tables, depthwise taps)
    in float32 or wider. Kernels and depthwise taps have the channels last in memory. What is quantized stays so. They
    are complete on return, for threads that read them on streams of their own.
    """
    placed = {}
    for name, tensor in folded.items():
        moved = tensor.to(device, tensor.dtype if tensor.dtype == E4M3 else placed_dtype(name, tensor, dtype))
        # Depthwise taps are [C,3,3].
        image = tensor.dim() > 3 or name.endswith(".depthwise")
        placed[name] = channels_last(moved) if image else moved.contiguous()
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return placed


def channels_last(kernel: Tensor) -> Tensor:
    """The same kernel [O,C,K,K], or [4,O,C,2,2] as phases, with its channels last in memory; itself if they are."""
    return kernel.movedim(-3, -1).contiguous().movedim(-1, -3)


def placed_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What `place` makes of a folded tensor that is not quantized: vectors stay in float32 or wider."""
    vector = tensor.dim() == 1 or name.endswith(VECTORS)
    return torch.promote_types(dtype, torch.float32) if vector else dtype


def folds(folded: Mapping[str, Tensor]) -> list[str]:
    """What the folded tensors have taken in, one phrase for each kind of fold that occurs, read from their names.

    These are the folds of building blocks; a family adds its own (`families/base.py`).
    """
    kinds = (
        (".qkv.weight", "q, k and v of {} attentions into one matrix each"),
        (".cross.keys", "the prompt's keys and values of {} cross-attentions, which are constants"),
        (".cross.prompt", "the projections of each image's prompt to keys and values into one matrix in {} places"),
        (".weight2", "the last feed-forward of {} transformers into their output projection"),
        (".shortcut_weight", "{} 1x1 shortcuts into the convolutions they are added to"),
        (".phases", "{} nearest enlargements into 2x2 phases"),
        (".weight_scale", "{} linears in e4m3, with a scale for each output channel"),
    )
    numbers = [(sum(name.endswith(ending) for name in folded), phrase) for ending, phrase in kinds]
    found = [phrase.format(number) for number, phrase in numbers if number]
    if any(name.startswith("encoder.layers.") for name in folded):
        found.append("the tiny VAE's range maps and the latent scale")
    return found


class Folder:
    """Reads tensors of a normalized checkpoint and collects folded ones under the network's own names."""

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.tensors = tensors
        self.dtype = dtype
        self.vector_dtype = torch.promote_types(dtype, torch.float32)
        self.folded: dict[str, Tensor] = {}

    def has(self, name: str) -> bool:
        """Whether the checkpoint carries this tensor."""
        return name in self.tensors

    def get(self, name: str) -> Tensor:
        """The checkpoint's tensor in float64."""
        return self.tensors[name].double()

    def bias(self, prefix: str, like: Tensor) -> Tensor:
        """`prefix.bias` in float64, zeros of like's first dimension when there is none."""
        return self.get(f"{prefix}.bias") if self.has(f"{prefix}.bias") else like.new_zeros(like.shape[0])

    def matrix(self, name: str, value: Tensor) -> None:
        """Store a matrix or kernel, rounded to the network's dtype."""
        self._store(name, value.to(self.dtype))

    def vector(self, name: str, value: Tensor) -> None:
        """Store a bias, scale or table, rounded to float32 or wider."""
        self._store(name, value.to(self.vector_dtype))

    def _store(self, name: str, rounded: Tensor) -> None:
        """Keep a folded tensor, laid out so that `place` copies nothing."""
        self.folded[name] = channels_last(rounded) if rounded.dim() > 3 else rounded

    def affine(self, name: str, source: str) -> None:
        """A norm's weight and bias, unchanged."""
        self.vector(f"{name}.weight", self.get(f"{source}.weight"))
        self.vector(f"{name}.bias", self.get(f"{source}.bias"))

    def linear(self, name: str, weight: Tensor, bias: Tensor) -> None:
        """A linear layer from an already folded float64 weight [O,I] and bias [O]."""
        self.matrix(f"{name}.weight", weight)
        self.vector(f"{name}.bias", bias)

    def gated_linear(self, name: str, weight: Tensor, bias: Tensor, gate: Tensor) -> None:
        """gate * (weight x + bias): the gate [O] goes into the weight where half precision allows it."""
        rows = (weight * gate[:, None]).square().mean(1).sqrt()
        if bool(((rows >= SMALLEST_ROW) | (gate == 0)).all()):
            self.linear(name, weight * gate[:, None], bias * gate)
        else:
            self.linear(name, weight, bias)
            self.vector(f"{name}.gate", gate)

    def dense_weight(self, source: str) -> tuple[Tensor, Tensor]:
        """(weight [O,C,3,3], bias [O]) in float64 of a dense or separable convolution.

        pointwise(depthwise(x)) with nothing in between is the dense kernel W[o,c] = P[o,c] * D[c].
        """
        if self.has(f"{source}.weight"):
            weight = self.get(f"{source}.weight")
            return weight, self.bias(source, weight)
        pointwise = self.get(f"{source}.pointwise.weight").flatten(1)
        depthwise = self.get(f"{source}.depthwise.weight")[:, 0]
        return pointwise[:, :, None, None] * depthwise, self.bias(f"{source}.pointwise", pointwise)

    def conv(
        self,
        name: str,
        source: str,
        *,
        scale: float = 1.0,
        in_scale: float = 1.0,
        extra_bias: Tensor | float = 0.0,
        shortcut: str | None = None,
        upsample: bool = False,
    ) -> None:
        """A 3x3 convolution: scale * conv(in_scale * x) + extra_bias, plus `shortcut`, a 1x1 convolution.

        A dense convolution after a nearest enlargement becomes its four 2x2 phases.
        """
        if self.has(f"{source}.depthwise.weight"):
            pointwise = self.get(f"{source}.pointwise.weight").flatten(1)
            self.vector(f"{name}.depthwise", self.get(f"{source}.depthwise.weight")[:, 0])
            self.matrix(f"{name}.pointwise", pointwise * (scale * in_scale))
            bias = self.bias(f"{source}.pointwise", pointwise)
        else:
            weight, bias = self.dense_weight(source)
            if scale * in_scale != 1:
                weight = weight * (scale * in_scale)
            if upsample:  # in pieces, for in float64 it takes 16/9 of the largest kernels' memory
                pieces = [phase_weights(piece).to(self.dtype) for piece in weight.split(PIECE)]
                self.matrix(f"{name}.phases", torch.cat(pieces, 1))
            else:
                self.matrix(f"{name}.weight", weight)
        # Whether there is a bias follows from the layers, not from values, so that shapes alone can be folded too.
        biased = self._has_bias(source) or isinstance(extra_bias, Tensor) or extra_bias != 0
        bias = bias * scale + extra_bias
        if shortcut is not None:
            weight = self.get(f"{shortcut}.weight").flatten(1)
            self.matrix(f"{name}.shortcut_weight", weight)
            bias = bias + self.bias(shortcut, weight)
            biased = biased or self._has_bias(shortcut)
        if biased:
            self.vector(f"{name}.bias", bias)

    def _has_bias(self, source: str) -> bool:
        return self.has(f"{source}.bias") or self.has(f"{source}.pointwise.bias")

    def input_conv(self, name: str, source: str, *, unshuffle: int = 1, signed_range: bool = False) -> None:
        """The first convolution on the image u in [0,1].

        unshuffle r: PixelUnshuffle(r) + 3x3 as one 3r x 3r kernel of stride r. signed_range: the network wants 2u-1,
        so W' = 2W and b' = b - sum W; the zero padding of 2u-1 then is u = 0.5, which the network passes as border.
        """
        weight, bias = self.dense_weight(source)
        if unshuffle > 1:
            o, channels, _, _ = weight.shape
            r = unshuffle
            # channel c*r*r + dy*r + dx at tap (ky, kx) is pixel (ky*r+dy, kx*r+dx) of channel c
            blocks = weight.view(o, channels // (r * r), r, r, 3, 3)
            weight = blocks.permute(0, 1, 4, 2, 5, 3).reshape(o, channels // (r * r), 3 * r, 3 * r)
        if signed_range:
            bias = bias - weight.sum((1, 2, 3))
            weight = 2 * weight
        self.matrix(f"{name}.weight", weight)
        self.vector(f"{name}.bias", bias)
