"""Stable Diffusion's VAE (diffusers' AutoencoderKL): its config.json, and the tensors that follow from it.

The names and shapes: diffusers models/autoencoders/autoencoder_kl.py and vae.py. Before diffusers 0.15 the attention of
the middle blocks had other names; files of that time, Stable Diffusion 2.1's for one, still have them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sd.values import Values
from tinysr_kernels.checkpoint.structure import GAIN, LEVELS

KL_VAE = Part(
    "kl-vae",
    "a Stable Diffusion VAE (keys encoder.down_blocks.*, decoder.up_blocks.*)",
    re.compile(r"^encoder\.down_blocks\.[0-9]+\.resnets\."),
    names=("vae",),
    class_name="AutoencoderKL",
)
SCALING_FACTOR = 0.18215
"""diffusers' default, which the configurations of that time do not state."""
EPS = 1e-6
"""Of every GroupNorm: fixed in diffusers."""
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_NAME = re.compile(
    r"((?:encoder|decoder)\.mid_block\.attentions\.0\.)(query|key|value|proj_attn)(\.(?:weight|bias))"
)
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "in_channels": (3,),
    "out_channels": (3,),
    "act_fn": ("silu", "swish"),
    "mid_block_add_attention": (True,),
    "latents_mean": (None,),
    "latents_std": (None,),
}
Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """What a VAE's config.json says. quant and post_quant: whether the 1x1 convolutions around the latent are there."""

    widths: tuple[int, ...]
    layers: int
    latent: int
    groups: int
    scaling_factor: float
    quant: bool = True
    post_quant: bool = True


def layout_from_config(config: Mapping[str, Any], where: str) -> Layout:
    """Read an AutoencoderKL's config.json. CheckpointError naming a value that is absurd or of another network."""
    values = Values(config, where)
    values.only(_ONLY)
    widths = values.wholes("block_out_channels", (64,), LEVELS)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        found = config.get(name, [kind])
        if type(found) not in (list, tuple) or list(found) != [kind] * len(widths):
            raise values.refuse(name, f"{len(widths)} of {kind}")
    groups = values.whole("norm_num_groups", 32)
    if any(width % groups for width in widths):
        raise values.refuse("norm_num_groups", f"a divisor of the widths {list(widths)}")
    quant = [config.get(name, True) for name in ("use_quant_conv", "use_post_quant_conv")]
    for name, value in zip(("use_quant_conv", "use_post_quant_conv"), quant, strict=True):
        if type(value) is not bool:
            raise values.refuse(name, "true or false")
    return Layout(
        widths,
        values.whole("layers_per_block", 1, 64),
        values.whole("latent_channels", 4, 64),
        groups,
        values.number("scaling_factor", SCALING_FACTOR, *GAIN),
        *quant,
    )


def modern(name: str) -> str:
    """Today's name of a tensor of the attention in a middle block; any other unchanged."""
    found = _OLD_NAME.fullmatch(name)
    return f"{found[1]}{OLD_ATTENTION[found[2]]}{found[3]}" if found else name


def checked(file: TensorFile, layout: Layout) -> dict[str, Tensor]:
    """The VAE's tensors under today's names. CheckpointError for what is missing, unknown or of another shape."""
    stored = {modern(name): name for name in file.only_tensors()}
    tensors = {name: file.tensors[key] for name, key in stored.items()}
    weights = Weights(tensors, lambda name: f"{file.where}: {quoted(stored.get(name, name))}")
    check(weights, layout)
    return weights.finish()


def check(weights: Weights, layout: Layout) -> None:
    """Take every tensor of the VAE; CheckpointError naming one that is missing or of another shape."""
    for name, shape in _shapes(layout):
        if len(shape) == 2:
            weights.as_linear(name)  # the attention's, in old files
        weights.take(name, shape)


def _shapes(layout: Layout) -> Shapes:
    last = len(layout.widths) - 1
    yield from _affine("encoder.conv_in", layout.widths[0], 3, 3, 3)
    channels = layout.widths[0]
    for i, width in enumerate(layout.widths):
        for j in range(layout.layers):
            yield from _resnet(f"encoder.down_blocks.{i}.resnets.{j}", channels, width)
            channels = width
        if i < last:
            yield from _affine(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width, 3, 3)
    yield from _middle("encoder", channels)
    yield from _affine("encoder.conv_norm_out", channels)
    yield from _affine("encoder.conv_out", 2 * layout.latent, channels, 3, 3)
    for name, width, there in (
        ("quant_conv", 2 * layout.latent, layout.quant),
        ("post_quant_conv", layout.latent, layout.post_quant),
    ):
        if there:
            yield from _affine(name, width, width, 1, 1)
    yield from _affine("decoder.conv_in", channels, layout.latent, 3, 3)
    yield from _middle("decoder", channels)
    for i, width in enumerate(layout.widths[::-1]):
        for j in range(layout.layers + 1):
            yield from _resnet(f"decoder.up_blocks.{i}.resnets.{j}", channels, width)
            channels = width
        if i < last:
            yield from _affine(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width, 3, 3)
    yield from _affine("decoder.conv_norm_out", channels)
    yield from _affine("decoder.conv_out", 3, channels, 3, 3)


def _middle(half: str, channels: int) -> Shapes:
    name = f"{half}.mid_block"
    yield from _resnet(f"{name}.resnets.0", channels, channels)
    yield from _affine(f"{name}.attentions.0.group_norm", channels)
    for part in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _affine(f"{name}.attentions.0.{part}", channels, channels)
    yield from _resnet(f"{name}.resnets.1", channels, channels)


def _resnet(name: str, inputs: int, outputs: int) -> Shapes:
    yield from _affine(f"{name}.norm1", inputs)
    yield from _affine(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from _affine(f"{name}.norm2", outputs)
    yield from _affine(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _affine(f"{name}.conv_shortcut", outputs, inputs, 1, 1)


def _affine(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
