"""The pruned UNet (AdcSR, arXiv 2411.13383; this project's `tinysr-unet`) with every constant folded.

Folded: the range map and PixelUnshuffle into the first convolution, time biases into the bias of conv1, LayerNorms'
affine parts into the linears that follow, q, k and v into one matrix, the last feed-forward and proj_out into one
matmul over two inputs, each 1x1 shortcut into conv2, biases together, nearest enlargement into 2x2 phases.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from tinysr_kernels.nets import transformer
from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Conv, Features, Folded, GroupNorm, InputConv, count
from tinysr_kernels.nets.transformer import Transformer, fold_transformer


class Options(transformer.Options, Protocol):
    """What the weights leave open; `families.UNetConfig` has these fields."""

    @property
    def input(self) -> str:
        """ "unshuffle": the image itself through PixelUnshuffle; "vae": a latent."""

    @property
    def unshuffle(self) -> int:
        """The factor of PixelUnshuffle."""

    @property
    def unet_eps(self) -> float:
        """Of the residual blocks' GroupNorms and of `conv_norm_out`."""

    @property
    def prediction(self) -> str:
        """ "direct": the result is the UNet's output; "subtract": the latent minus it."""


def fold_unet(tensors: Mapping[str, Tensor], options: Options, dtype: torch.dtype) -> Folded:
    """Fold the tensors `unet.*` of a normalized checkpoint; names as `UNet` reads them."""
    f = Folder(tensors, dtype)
    if options.input == "unshuffle":
        f.input_conv("unet.conv_in", "unet.conv_in", unshuffle=options.unshuffle, signed_range=True)
    else:
        f.conv("unet.conv_in", "unet.conv_in")
    fold_blocks(f)
    sign = -1.0 if options.prediction == "subtract" else 1.0
    f.conv("unet.conv_out", "unet.conv_out", scale=sign)
    return f.folded


def fold_blocks(f: Folder) -> None:
    """Everything between `unet.conv_in` and `unet.conv_out`."""
    for prefix in block_prefixes(f.tensors):
        for j in range(count(f.tensors, f"{prefix}.resnets")):
            fold_resnet(f, f"{prefix}.resnets.{j}")
        for j in range(count(f.tensors, f"{prefix}.attentions")):
            fold_transformer(f, f"{prefix}.attentions.{j}")
        if count(f.tensors, f"{prefix}.downsamplers"):
            f.conv(f"{prefix}.downsamplers.0", f"{prefix}.downsamplers.0.conv")
        if count(f.tensors, f"{prefix}.upsamplers"):
            f.conv(f"{prefix}.upsamplers.0", f"{prefix}.upsamplers.0.conv", upsample=True)
    f.affine("unet.conv_norm_out", "unet.conv_norm_out")


def block_prefixes(names: Mapping[str, object]) -> list[str]:
    """`unet.down_blocks.0`, ..., `unet.mid_block`, `unet.up_blocks.0`, ... as far as they occur."""
    pattern = re.compile(r"unet\.(?:(?:down|up)_blocks\.\d+|mid_block)(?=\.)")
    return sorted({found.group(0) for name in names if (found := pattern.match(name))})


def fold_resnet(f: Folder, source: str) -> None:
    """norm1, conv1 (+ time bias), norm2, conv2 (+ shortcut)."""
    f.affine(f"{source}.norm1", f"{source}.norm1")
    time_bias = f.get(f"{source}.time_bias") if f.has(f"{source}.time_bias") else 0.0
    f.conv(f"{source}.conv1", f"{source}.conv1", extra_bias=time_bias)
    f.affine(f"{source}.norm2", f"{source}.norm2")
    shortcut = f"{source}.conv_shortcut" if f.has(f"{source}.conv_shortcut.weight") else None
    f.conv(f"{source}.conv2", f"{source}.conv2", shortcut=shortcut)


class Resnet(nn.Module):
    """conv2(SiLU(norm2(conv1(SiLU(norm1(x)))))) + shortcut, on one tensor or on the concatenation of two."""

    def __init__(self, folded: Folded, prefix: str, groups: tuple[int, ...], eps: float) -> None:
        super().__init__()
        self.groups = groups
        self.norm1 = GroupNorm(folded, f"{prefix}.norm1", groups, eps)
        self.conv1 = Conv(folded, f"{prefix}.conv1")
        self.norm2 = GroupNorm(folded, f"{prefix}.norm2", groups, eps)
        self.conv2 = Conv(folded, f"{prefix}.conv2")

    def forward(
        self,
        x: Features,
        skip: Features | None = None,
        next_norm: GroupNorm | None = None,
        next_skip: Features | None = None,
        moments: bool = False,
    ) -> Features:
        """[N,C1,H,W] (and [N,C2,H,W]) -> [N,O,H,W].

        next_norm: the GroupNorm that consumes the result, over the concatenation with `next_skip`; moments: see
        `Conv.features`.
        """
        h = self.norm2(self.conv1.features(self.norm1(x, skip), self.groups, next_norm=self.norm2))
        other = None if skip is None else skip.image
        residual, shortcut = None, x.image
        if self.conv2.shortcut_weight is None:
            residual = shortcut if other is None else torch.cat([shortcut, other], 1)
        return self.conv2.features(
            h,
            self.groups,
            next_norm=next_norm,
            next_skip=None if next_skip is None else next_skip.image,
            moments=moments,
            residual=residual,
            shortcut=shortcut,
            skip=other,
        )


class Stage(nn.Module):
    """One down, middle or up block: resnets, each followed by its transformer if there is one, then a sampler."""

    def __init__(self, folded: Folded, prefix: str, options: Options) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            Resnet(folded, f"{prefix}.resnets.{j}", options.groups, options.unet_eps)
            for j in range(count(folded, f"{prefix}.resnets"))
        )
        self.attentions = nn.ModuleList(
            Transformer(folded, f"{prefix}.attentions.{j}", options)
            for j in range(count(folded, f"{prefix}.attentions"))
        )
        self.downsamplers = nn.ModuleList(
            Conv(folded, f"{prefix}.downsamplers.{j}", stride=2) for j in range(count(folded, f"{prefix}.downsamplers"))
        )
        self.upsamplers = nn.ModuleList(
            Conv(folded, f"{prefix}.upsamplers.{j}", upsample=True)
            for j in range(count(folded, f"{prefix}.upsamplers"))
        )

    def step(
        self, j: int, x: Features, skip: Features | None, next_norm: GroupNorm | None, next_skip: Features | None
    ) -> Features:
        """Resnet j and the transformer after it; next_norm, next_skip: what takes the result, as `Resnet` says."""
        if j >= len(self.attentions):
            found: Features = self.resnets[j](x, skip, next_norm, next_skip)
            return found
        transformer = self.attentions[j]
        mixed: Features = transformer(self.resnets[j](x, skip, transformer.norm))
        return mixed

    def places(self, kind: str, groups: tuple[int, ...]) -> Iterator[Place]:
        """What a stage of this kind, "down", "mid" or "up", does in order."""
        for j, resnet in enumerate(self.resnets):
            norm = resnet.norm1 if isinstance(resnet, Resnet) else None
            yield Place(functools.partial(self.step, j), norm, kind == "up", kind == "down")
        for sampler in (*self.downsamplers, *self.upsamplers):
            yield Place(functools.partial(_sample, sampler, groups), None, False, kind == "down")


@dataclass(frozen=True)
class Place:
    """One step of the UNet.

    run(x, skip, next_norm, next_skip). norm: the GroupNorm at its input, if any. takes_skip: whether it pops the last
    skip. returns_skip: whether its result is pushed as one.
    """

    run: Callable[[Features, Features | None, GroupNorm | None, Features | None], Features]
    norm: GroupNorm | None
    takes_skip: bool
    returns_skip: bool


def _sample(
    sampler: Conv,
    groups: tuple[int, ...],
    x: Features,
    skip: Features | None,
    next_norm: GroupNorm | None,
    next_skip: Features | None,
) -> Features:
    """The convolution that halves or doubles the image after the resnets.

    A doubled side may be one pixel longer than that of the skip which it meets next, an odd one halved and rounded up.
    """
    if sampler.upsample and next_skip is not None:
        height, width = next_skip.image.shape[2:]
        if (height, width) != (2 * x.image.shape[2], 2 * x.image.shape[3]):
            return Features(sampler.cropped(x.image, height, width))
    skip_image = None if next_skip is None else next_skip.image
    return sampler.features(x.image, groups, next_norm=next_norm, next_skip=skip_image)


class UNet(nn.Module):
    """Image in [0,1] (PixelUnshuffle input) or latent -> the decoder's input."""

    def __init__(self, folded: Folded, options: Options) -> None:
        super().__init__()
        self.conv_in = self._conv_in(folded, options)
        downs, ups = (count(folded, f"unet.{kind}_blocks") for kind in ("down", "up"))
        self.down_blocks = nn.ModuleList(Stage(folded, f"unet.down_blocks.{i}", options) for i in range(downs))
        self.mid_block = Stage(folded, "unet.mid_block", options)
        self.up_blocks = nn.ModuleList(Stage(folded, f"unet.up_blocks.{i}", options) for i in range(ups))
        self.conv_norm_out = GroupNorm(folded, "unet.conv_norm_out", options.groups, options.unet_eps)
        self.conv_out = self._conv_out(folded)
        self.subtract = options.prediction == "subtract"
        self.groups = options.groups
        self.factor = 2 ** sum(len(stage.downsamplers) for stage in self.stages("down"))

    def _conv_in(self, folded: Folded, options: Options) -> nn.Module:
        """The first convolution."""
        if options.input == "unshuffle":
            return InputConv(folded, "unet.conv_in", stride=options.unshuffle, border=0.5)
        return Conv(folded, "unet.conv_in")

    def _conv_out(self, folded: Folded) -> nn.Module:
        """The last convolution."""
        return Conv(folded, "unet.conv_out")

    def stages(self, kind: str) -> list[Stage]:
        """The down or up blocks, typed."""
        blocks = self.down_blocks if kind == "down" else self.up_blocks
        return [stage for stage in blocks if isinstance(stage, Stage)]

    def forward(self, x: Tensor) -> Tensor:
        """[N,3,H,W] or latent [N,C,h,w] -> [N,O,h,w]; skips go last in, first out."""
        places = [
            *(place for stage in self.stages("down") for place in stage.places("down", self.groups)),
            *self.mid_block.places("mid", self.groups),
            *(place for stage in self.stages("up") for place in stage.places("up", self.groups)),
        ]
        norms = [*(place.norm for place in places), self.conv_norm_out]
        takes = [*(place.takes_skip for place in places), False]
        h = self._first(x, norms[0])
        skips = [h]
        for place, norm, take in zip(places, norms[1:], takes[1:], strict=True):
            skip = skips.pop() if place.takes_skip else None
            # If the next step takes this very result as its skip, its norm cannot be fused here.
            next_norm = None if take and place.returns_skip else norm
            h = place.run(h, skip, next_norm, skips[-1] if take else None)
            if place.returns_skip:
                skips.append(h)
        return self.conv_out(self.conv_norm_out(h), residual=x if self.subtract else None)

    def _first(self, x: Tensor, next_norm: GroupNorm | None) -> Features:
        if isinstance(self.conv_in, Conv):
            return self.conv_in.features(x, self.groups, next_norm=next_norm)
        return Features(self.conv_in(x))
