"""The tiny VAE's halves (AutoencoderTiny's layers, any convolution dense or separable) with range maps folded.

The encoder takes the image in [0,1]: the pipeline's *2-1 and the encoder's own (x+1)/2 cancel, and zero padding comes
after both. The decoder ends at its last convolution: its *2-1 and the pipeline's /2+0.5 cancel. The latent scaling
factor is folded into the encoder's last and the decoder's first step; the 3 of tanh(z/3)*3 into the first convolution.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Conv, Folded, InputConv, ops

Step = tuple[str, int]
"""(kind, layer index): kind is conv, down (stride 2), up (nearest x2 before the convolution) or block."""


def encoder_steps(blocks: tuple[int, ...]) -> Iterator[Step]:
    """The encoder's layers in order; indices are those of the checkpoint's keys `encoder.layers.K`."""
    yield "conv", 0
    k = 1
    for stage, repeats in enumerate(blocks):
        if stage:
            yield "down", k
            k += 1
        for _ in range(repeats):
            yield "block", k
            k += 1
    yield "conv", k


def decoder_steps(blocks: tuple[int, ...]) -> Iterator[Step]:
    """The decoder's layers in order; index 1 is a ReLU and each enlargement takes an index of its own."""
    yield "conv", 0
    k = 2
    for stage, repeats in enumerate(blocks):
        for _ in range(repeats):
            yield "block", k
            k += 1
        if stage < len(blocks) - 1:
            yield "up", k + 1
            k += 2
    yield "conv", k


BLOCK_CONVS = (0, 2, 4)


def halo(blocks: tuple[int, ...]) -> int:
    """How far, in latent pixels, an output of encoder or decoder depends on its inputs, rounded up.

    Every 3x3 convolution reaches one pixel of its own grid; stage i of the encoder (counted from the image) has
    3 * blocks[i] of them and, after the first stage, a strided one on the finer grid. The decoder is its mirror image.
    """
    stages = len(blocks)
    pixels = 1 + 2 ** (stages - 1)
    for i, repeats in enumerate(blocks):
        pixels += 3 * repeats * 2**i + (2 ** (i - 1) if i else 0)
    return -(-pixels // 2 ** (stages - 1)) + 1


def fold_encoder(tensors: Mapping[str, Tensor], dtype: torch.dtype, blocks: tuple[int, ...], scale: float) -> Folded:
    """Fold `encoder.layers.*`; `scale` multiplies the latent."""
    f = Folder(tensors, dtype)
    steps = list(encoder_steps(blocks))
    for kind, k in steps:
        source = f"encoder.layers.{k}"
        if kind == "block":
            _fold_block(f, source)
        elif k == 0:
            f.input_conv(source, source)
        else:
            f.conv(source, source, scale=scale if k == steps[-1][1] else 1.0)
    return f.folded


def fold_decoder(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, blocks: tuple[int, ...], out_bias: float = 0.0
) -> Folded:
    """Fold `decoder.layers.*`; `out_bias` is added to the image in [0,1]."""
    f = Folder(tensors, dtype)
    steps = list(decoder_steps(blocks))
    for kind, k in steps:
        source = f"decoder.layers.{k}"
        if kind == "block":
            _fold_block(f, source)
        else:
            in_scale = 3.0 if k == 0 else 1.0
            extra = out_bias if k == steps[-1][1] else 0.0
            f.conv(source, source, in_scale=in_scale, extra_bias=extra, upsample=kind == "up")
    return f.folded


def _fold_block(f: Folder, source: str) -> None:
    for j in BLOCK_CONVS:
        f.conv(f"{source}.conv.{j}", f"{source}.conv.{j}")


class Block(nn.Module):
    """relu(conv(relu(conv(relu(conv(x))))) + x)."""

    def __init__(self, folded: Folded, prefix: str) -> None:
        super().__init__()
        self.conv = nn.ModuleDict({str(j): Conv(folded, f"{prefix}.conv.{j}") for j in BLOCK_CONVS})
        self.separable = all(conv.kind == "separable" for conv in self.conv.values())

    def forward(self, x: Tensor) -> Tensor:
        """[N,C,H,W] -> the same shape."""
        first, second, third = self.conv.values()
        if self.separable:
            weights = [t for conv in (first, second, third) for t in (conv.depthwise, conv.pointwise, conv.bias)]
            return ops.sepconv_block(x, *weights)
        return third(second(first(x, activation="relu"), activation="relu"), activation="relu", residual=x)


class Encoder(nn.Module):
    """Image in [0,1] [N,3,8h,8w] -> scaled latent [N,C,h,w] (three stages of stride 2 in the release)."""

    def __init__(self, folded: Folded, blocks: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for kind, k in encoder_steps(blocks):
            prefix = f"encoder.layers.{k}"
            layer: nn.Module
            if kind == "block":
                layer = Block(folded, prefix)
            elif k == 0:
                layer = InputConv(folded, prefix)
            else:
                layer = Conv(folded, prefix, stride=2 if kind == "down" else 1)
            self.layers[str(k)] = layer
        self.factor = 2 ** (len(blocks) - 1)

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.layers.values():
            image = layer(image)
        return image


class Decoder(nn.Module):
    """Scaled latent [N,C,h,w] -> image [N,3,8h,8w], [0,1] up to overshoot."""

    def __init__(self, folded: Folded, blocks: tuple[int, ...], scaling_factor: float) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for kind, k in decoder_steps(blocks):
            prefix = f"decoder.layers.{k}"
            self.layers[str(k)] = (
                Block(folded, prefix) if kind == "block" else Conv(folded, prefix, upsample=kind == "up")
            )
        self.factor = 2 ** (len(blocks) - 1)
        self.input_gain = 1 / (3 * scaling_factor)

    def forward(self, z: Tensor, residual: Tensor | None = None) -> Tensor:
        first, *middle, last = self.layers.values()
        x = first(ops.tanh_scaled(z, self.input_gain), activation="relu")
        for layer in middle:
            x = layer(x)
        return last(x, residual=residual)
