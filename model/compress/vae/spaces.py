"""Which axes of which tensors hold the same channels, and so must be pruned together.

A *space* is a set of channels with one numbering: a residual stream with everything added to it, or the hidden width
of a block. Every axis of every tensor is a space, or several side by side where the network concatenates (the UNet's
skips). Derived from names and shapes for the three kinds of network that the recipe meets: AutoencoderKL, the tiny VAE
and the UNet. Spaces in `fixed` (image, latent, the insides of attention) are never cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.reference.pruned_unet import Shapes, count, under
from model.reference.tiny_vae import BLOCK_CONVS, decoder_steps, encoder_steps
from tinysr_kernels.families import UNetConfig

Stream = tuple[str, ...]
"""Spaces in the order in which they are concatenated."""
Keep = Mapping[str, Tensor]
"""Space -> ascending indices of kept channels; all channels of other spaces are kept."""


@dataclass
class Spaces:
    """Filled by walking a network in the order of its forward pass."""

    shapes: Shapes
    widths: dict[str, int] = field(default_factory=dict)
    axes: dict[str, list[tuple[int, Stream]]] = field(default_factory=dict)
    """Tensor -> its (axis, stream) pairs."""
    norms: dict[str, Stream] = field(default_factory=dict)
    """GroupNorm, by name -> what it normalizes."""
    consumers: dict[str, Stream] = field(default_factory=dict)
    """Convolution (dense, separable or 1x1), by name -> its input."""
    fixed: set[str] = field(default_factory=set)

    def space(self, name: str, width: int, fixed: bool = False) -> Stream:
        """A new space; returns the stream of it alone."""
        self.widths[name] = width
        if fixed:
            self.fixed.add(name)
        return (name,)

    def width(self, stream: Stream) -> int:
        return sum(self.widths[name] for name in stream)

    def outputs(self, conv: str) -> int:
        """Number of output channels of a convolution."""
        separable = f"{conv}.pointwise.weight"
        return int(self.shapes[separable if separable in self.shapes else f"{conv}.weight"][0])

    def conv(self, name: str, inputs: Stream, outputs: Stream | None = None) -> Stream:
        """Enter a convolution; without `outputs` its output is a new space."""
        found = self.outputs(name)
        outputs = outputs or self.space(name, found)
        if self.width(outputs) != found:
            raise ValueError(f"{name} gives {found} channels, expected {self.width(outputs)}")
        self.consumers[name] = inputs
        sides = {"weight": ((0, outputs), (1, inputs)), "bias": ((0, outputs),)}
        sides |= {f"pointwise.{part}": axes for part, axes in sides.items()} | {"depthwise.weight": ((0, inputs),)}
        for part, axes in sides.items():
            if f"{name}.{part}" in self.shapes:
                self.axes[f"{name}.{part}"] = list(axes)
        return outputs

    def norm(self, name: str, stream: Stream) -> None:
        """Enter a GroupNorm's gain and shift."""
        self.norms[name] = stream
        self.vector(f"{name}.weight", stream)
        self.vector(f"{name}.bias", stream)

    def vector(self, name: str, stream: Stream) -> None:
        self.axes[name] = [(0, stream)]

    def resnet(self, name: str, inputs: Stream) -> Stream:
        """Enter a residual block; its output is its input's space unless a shortcut makes a new one."""
        self.norm(f"{name}.norm1", inputs)
        hidden = self.conv(f"{name}.conv1", inputs)
        self.norm(f"{name}.norm2", hidden)
        if f"{name}.time_bias" in self.shapes:
            self.vector(f"{name}.time_bias", hidden)
        outputs = inputs
        if f"{name}.conv_shortcut.weight" in self.shapes:
            outputs = self.conv(f"{name}.conv_shortcut", inputs)
        return self.conv(f"{name}.conv2", hidden, outputs)

    def attention(self, name: str, norm: str, inputs: Sequence[str], output: str, stream: Stream) -> None:
        """Enter what attention reads from and adds to a stream; its own width is fixed, since it sets the scale."""
        self.norm(f"{name}.{norm}", stream)
        for part in inputs:
            inner = self.space(f"{name}.{part}", int(self.shapes[f"{name}.{part}.weight"][0]), fixed=True)
            self.axes[f"{name}.{part}.weight"] = [(0, inner), (1, stream)]
        self.vector(f"{name}.{output}.bias", stream)
        self.axes[f"{name}.{output}.weight"] = [(0, stream)]


# -------------------------------------------------------------------------------------------------- the networks
def kl_spaces(shapes: Shapes) -> Spaces:
    """AutoencoderKL with keys `encoder.*` and `decoder.*`, both whole (model/reference/kl_vae.py)."""
    spaces = Spaces(shapes)
    x = spaces.conv("encoder.conv_in", spaces.space("encoder.image", 3, fixed=True))
    for i in range(count(shapes, "encoder.down_blocks")):
        x = _kl_block(spaces, f"encoder.down_blocks.{i}", x)
    x = _kl_block(spaces, "encoder.mid_block", x)
    _finish(spaces, "encoder", x)
    latent = int(shapes["decoder.conv_in.weight"][1]) if "decoder.conv_in.weight" in shapes else None
    latent = latent or int(shapes["decoder.conv_in.depthwise.weight"][0])
    x = spaces.conv("decoder.conv_in", spaces.space("decoder.latent", latent, fixed=True))
    x = _kl_block(spaces, "decoder.mid_block", x)
    for i in range(count(shapes, "decoder.up_blocks")):
        x = _kl_block(spaces, f"decoder.up_blocks.{i}", x)
    _finish(spaces, "decoder", x)
    return spaces


def _kl_block(spaces: Spaces, name: str, x: Stream) -> Stream:
    for j in range(count(spaces.shapes, f"{name}.resnets")):
        x = spaces.resnet(f"{name}.resnets.{j}", x)
        if under(spaces.shapes, f"{name}.attentions.{j}"):
            parts = ("to_q", "to_k", "to_v")
            spaces.attention(f"{name}.attentions.{j}", "group_norm", parts, "to_out.0", x)
    for sampler in ("downsamplers", "upsamplers"):
        if under(spaces.shapes, f"{name}.{sampler}.0"):
            x = spaces.conv(f"{name}.{sampler}.0.conv", x)
    return x


def _finish(spaces: Spaces, half: str, x: Stream) -> None:
    spaces.norm(f"{half}.conv_norm_out", x)
    width = spaces.outputs(f"{half}.conv_out")
    spaces.conv(f"{half}.conv_out", x, spaces.space(f"{half}.out", width, fixed=True))


def tiny_spaces(shapes: Shapes, encoder_blocks: Sequence[int], decoder_blocks: Sequence[int]) -> Spaces:
    """The tiny VAE with keys `encoder.layers.K` and `decoder.layers.K` (model/reference/tiny_vae.py)."""
    spaces = Spaces(shapes)
    for half, steps in (("encoder", encoder_steps(encoder_blocks)), ("decoder", decoder_steps(decoder_blocks))):
        walk = [(kind, f"{half}.layers.{number}") for kind, number in steps if kind not in ("relu", "up")]
        first = f"{walk[0][1]}.depthwise.weight"
        inputs = shapes[first][0] if first in shapes else shapes[f"{walk[0][1]}.weight"][1]
        x = spaces.space(f"{half}.in", int(inputs), fixed=True)
        for kind, name in walk[:-1]:
            if kind == "block":
                hidden = x
                for i in BLOCK_CONVS:
                    hidden = spaces.conv(f"{name}.conv.{i}", hidden, x if i == BLOCK_CONVS[-1] else None)
            else:
                x = spaces.conv(name, x)
        last = walk[-1][1]
        spaces.conv(last, x, spaces.space(f"{half}.out", spaces.outputs(last), fixed=True))
    return spaces


def unet_spaces(shapes: Shapes) -> Spaces:
    """The pruned UNet (model/reference/pruned_unet.py), keys without prefix: skips are concatenated on the way up."""
    spaces = Spaces(shapes)
    first = shapes.get("conv_in.weight", shapes.get("conv_in.depthwise.weight"))
    inputs = first[1] if first is not None and "conv_in.weight" in shapes else (first or [0])[0]
    x = spaces.conv("conv_in", spaces.space("in", int(inputs), fixed=True))
    skips = [x]
    for i in range(count(shapes, "down_blocks")):
        name = f"down_blocks.{i}"
        for j in range(count(shapes, f"{name}.resnets")):
            x = _unet_step(spaces, name, j, x)
            skips.append(x)
        if under(shapes, f"{name}.downsamplers.0"):
            x = spaces.conv(f"{name}.downsamplers.0.conv", x)
            skips.append(x)
    for j in range(count(shapes, "mid_block.resnets")):
        x = _unet_step(spaces, "mid_block", j, x)
    for i in range(count(shapes, "up_blocks")):
        name = f"up_blocks.{i}"
        for j in range(count(shapes, f"{name}.resnets")):
            x = _unet_step(spaces, name, j, x + skips.pop())
        if under(shapes, f"{name}.upsamplers.0"):
            x = spaces.conv(f"{name}.upsamplers.0.conv", x)
    spaces.norm("conv_norm_out", x)
    spaces.conv("conv_out", x, spaces.space("out", spaces.outputs("conv_out"), fixed=True))
    return spaces


def _unet_step(spaces: Spaces, block: str, number: int, x: Stream) -> Stream:
    x = spaces.resnet(f"{block}.resnets.{number}", x)
    if under(spaces.shapes, f"{block}.attentions.{number}"):
        spaces.attention(f"{block}.attentions.{number}", "norm", ("proj_in",), "proj_out", x)
    return x


# --------------------------------------------------------------------------------------------------------- cutting
def kept_of(spaces: Spaces, keep: Keep, stream: Stream) -> Tensor:
    """Indices, within the concatenation, of the channels of a stream that stay."""
    found, start = [], 0
    for name in stream:
        found.append(start + keep.get(name, torch.arange(spaces.widths[name])))
        start += spaces.widths[name]
    return torch.cat(found)


def groups_of(channels: int, config: UNetConfig, norm: str) -> int:
    """How many groups the networks give a GroupNorm of this width; ValueError naming it if none fits."""
    fitting = [g for g in config.groups if channels % g == 0]
    if not fitting:
        raise ValueError(f"{norm}: none of the group counts {config.groups} divides {channels} channels")
    return max(fitting)


def check(spaces: Spaces, keep: Keep, config: UNetConfig) -> None:
    """Every GroupNorm must go on normalizing the same groups, each pruned alike or removed.

    Raises ValueError naming the norm otherwise, or for indices that are not a cut of a space.
    """
    for name, index in keep.items():
        if name in spaces.fixed or name not in spaces.widths:
            raise ValueError(f"{name!r} is no space that can be cut")
        if not len(index) or (index.diff() <= 0).any() or index.min() < 0 or index.max() >= spaces.widths[name]:
            raise ValueError(f"{name}: indices to keep must ascend within its {spaces.widths[name]} channels")
    for norm, stream in spaces.norms.items():
        kept, width = kept_of(spaces, keep, stream), spaces.width(stream)
        size = width // groups_of(width, config, norm)
        left = torch.bincount(kept // size, minlength=width // size)
        left = left[left > 0]
        if (left != left[0]).any():
            raise ValueError(f"{norm}: its groups of {size} channels would keep {sorted(set(left.tolist()))} channels")
        if groups_of(len(kept), config, norm) != len(left):
            wanted = groups_of(len(kept), config, norm)
            raise ValueError(f"{norm}: {len(kept)} channels would be normalized in {wanted} groups, not {len(left)}")


def cut(state: Mapping[str, Tensor], spaces: Spaces, keep: Keep, config: UNetConfig) -> dict[str, Tensor]:
    """The state dict with every axis reduced to the channels that stay; ValueError as `check`."""
    check(spaces, keep, config)
    out = {}
    for name, tensor in state.items():
        for axis, stream in spaces.axes.get(name, []):
            if any(part in keep for part in stream):
                tensor = tensor.index_select(axis, kept_of(spaces, keep, stream))
        out[name] = tensor
    return out


def untouched(spaces: Spaces) -> list[str]:
    """Tensors that belong to no space; only the inner ones of attention, if the walk is complete."""
    inside = re.compile(r"attentions\.\d+\.(to_[qkv]\.bias|proj_in\.bias|transformer_blocks\.)")
    return [name for name in spaces.shapes if name not in spaces.axes and not inside.search(name)]
