"""Stable Diffusion's UNet (diffusers' UNet2DConditionModel): its config.json, and the tensors that follow from it.

The names and shapes: diffusers models/unets/unet_2d_condition.py and unet_2d_blocks.py. What would make another network
(class embeddings, other blocks, other attention) is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sd.values import Values
from tinysr_kernels.checkpoint.structure import LEVELS

UNET = Part(
    "sd-unet",
    "a Stable Diffusion UNet (keys down_blocks.*.attn2.*, up_blocks.*)",
    re.compile(r"^(down|up)_blocks\.[0-9]+\.attentions\.[0-9]+\.transformer_blocks\.[0-9]+\.attn2\."),
    names=("unet",),
    class_name="UNet2DConditionModel",
)
MOST_LAYERS = 64
TRANSFORMER_EPS, LAYER_EPS = 1e-6, 1e-5
"""Of the GroupNorm before a transformer and of its LayerNorms: fixed in diffusers."""
_DOWN, _UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "in_channels": (4,),
    "out_channels": (4,),
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1, 1.0),
    "act_fn": ("silu", "swish"),
    "dual_cross_attention": (False,),
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0, 1),
    "time_embedding_type": ("positional",),
    "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "reverse_transformer_layers_per_block": (None,),
}
"""What each value may be, diffusers' default first."""
Shapes = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Size:
    """What a UNet's config.json says, per level in the order of the down blocks where it is a tuple.

    widths: channels. layers: resnets per down block; an up block has one more. heads: of an attention, and `depths`
    transformer blocks, where `attends`. prompt: features of the prompt's embedding.
    """

    widths: tuple[int, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    attends: tuple[bool, ...]
    prompt: int
    groups: int
    eps: float
    latent: int = 4

    @property
    def embedding(self) -> int:
        """Features of the time step's embedding."""
        return 4 * self.widths[0]


def size_from_config(config: Mapping[str, Any], where: str) -> Size:
    """Read a UNet2DConditionModel's config.json.

    Raises CheckpointError naming the value that is missing, absurd, or that would make another network.
    """
    values = Values(config, where)
    values.only(_ONLY)
    widths = values.wholes("block_out_channels", (320, 640, 1280, 1280), LEVELS)
    count = len(widths)
    heads_name = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
    heads = values.each(heads_name, 8, count)  # diffusers' attention_head_dim is the number of heads
    groups = values.whole("norm_num_groups", 32)
    for width, number in zip(widths, heads, strict=True):
        if width % groups:
            raise values.refuse("norm_num_groups", f"a divisor of the widths {list(widths)}")
        if width % number:
            raise values.refuse(heads_name, f"a divisor of each of the widths {list(widths)}")
    attends = tuple(name == _DOWN[0] for name in _blocks(values, "down_block_types", _DOWN, count))
    ups = tuple(name == _UP[1] for name in _blocks(values, "up_block_types", _UP, count))
    if ups != attends[::-1]:
        raise values.refuse("up_block_types", "transformers where the down blocks have them")
    return Size(
        widths,
        tuple(min(n, MOST_LAYERS) for n in values.each("layers_per_block", 2, count)),
        heads,
        tuple(min(n, MOST_LAYERS) for n in values.each("transformer_layers_per_block", 1, count)),
        attends,
        values.whole("cross_attention_dim", 1280),
        groups,
        values.number("norm_eps", 1e-5, 1e-12, 1.0),
    )


def _blocks(values: Values, name: str, kinds: tuple[str, str], count: int) -> list[str]:
    """The types of the blocks, by default those of Stable Diffusion."""
    cross = kinds[0] if name.startswith("down") else kinds[1]
    plain = kinds[1] if name.startswith("down") else kinds[0]
    usual = [cross] * 3 + [plain]
    found = values.values.get(name, usual if name.startswith("down") else usual[::-1])
    if type(found) not in (list, tuple) or len(found) != count or not all(one in kinds for one in found):
        raise values.refuse(name, f"{count} of {kinds[0]} and {kinds[1]}")
    return list(found)


def check(weights: Weights, size: Size) -> None:
    """Take every tensor of the UNet; CheckpointError naming one that is missing or of another shape."""
    for name, shape in _shapes(size):
        if len(shape) == 2:
            weights.as_linear(name)  # before SD 2 the projections of transformers were 1x1 convolutions
        weights.take(name, shape)


def attention_heads(size: Size) -> Iterator[tuple[str, int]]:
    """(name, number of heads) of every transformer block."""
    levels = list(zip(size.attends, size.layers, size.heads, size.depths, strict=True))
    for kind, order, more in (("down", levels, 0), ("up", levels[::-1], 1)):
        for i, (attends, layers, heads, depth) in enumerate(order):
            for j in range(layers + more) if attends else ():
                for k in range(depth):
                    yield f"{kind}_blocks.{i}.attentions.{j}.transformer_blocks.{k}", heads
    for k in range(size.depths[-1]):
        yield f"mid_block.attentions.0.transformer_blocks.{k}", size.heads[-1]


def _shapes(size: Size) -> Shapes:
    """Names and shapes in the order in which they are computed."""
    first, last = size.widths[0], len(size.widths) - 1
    yield from _affine("time_embedding.linear_1", size.embedding, first)
    yield from _affine("time_embedding.linear_2", size.embedding, size.embedding)
    yield from _affine("conv_in", first, size.latent, 3, 3)
    channels, skips = first, [first]
    for i, width in enumerate(size.widths):
        for j in range(size.layers[i]):
            yield from _step(size, f"down_blocks.{i}", i, j, channels)
            channels = width
            skips.append(channels)
        if i < last:
            yield from _affine(f"down_blocks.{i}.downsamplers.0.conv", width, width, 3, 3)
            skips.append(width)
    yield from _resnet("mid_block.resnets.0", channels, channels, size.embedding)
    yield from _transformer("mid_block.attentions.0", channels, size.depths[-1], size.prompt)
    yield from _resnet("mid_block.resnets.1", channels, channels, size.embedding)
    for i in range(last + 1):
        level = last - i
        for j in range(size.layers[level] + 1):
            yield from _step(size, f"up_blocks.{i}", level, j, channels + skips.pop())
            channels = size.widths[level]
        if i < last:
            yield from _affine(f"up_blocks.{i}.upsamplers.0.conv", channels, channels, 3, 3)
    yield from _affine("conv_norm_out", channels)
    yield from _affine("conv_out", size.latent, channels, 3, 3)


def _step(size: Size, block: str, level: int, j: int, inputs: int) -> Shapes:
    """Resnet j of a block, and the transformer after it."""
    width = size.widths[level]
    yield from _resnet(f"{block}.resnets.{j}", inputs, width, size.embedding)
    if size.attends[level]:
        yield from _transformer(f"{block}.attentions.{j}", width, size.depths[level], size.prompt)


def _resnet(name: str, inputs: int, outputs: int, embedding: int) -> Shapes:
    yield from _affine(f"{name}.norm1", inputs)
    yield from _affine(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from _affine(f"{name}.time_emb_proj", outputs, embedding)
    yield from _affine(f"{name}.norm2", outputs)
    yield from _affine(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _affine(f"{name}.conv_shortcut", outputs, inputs, 1, 1)


def _transformer(name: str, width: int, depth: int, prompt: int) -> Shapes:
    yield from _affine(f"{name}.norm", width)
    yield from _affine(f"{name}.proj_in", width, width)
    for k in range(depth):
        block = f"{name}.transformer_blocks.{k}"
        for number, inputs in ((1, width), (2, prompt)):
            yield from _affine(f"{block}.norm{number}", width)
            yield f"{block}.attn{number}.to_q.weight", (width, width)
            yield f"{block}.attn{number}.to_k.weight", (width, inputs)
            yield f"{block}.attn{number}.to_v.weight", (width, inputs)
            yield from _affine(f"{block}.attn{number}.to_out.0", width, width)
        yield from _affine(f"{block}.norm3", width)
        yield from _affine(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _affine(f"{block}.ff.net.2", width, 4 * width)
    yield from _affine(f"{name}.proj_out", width, width)


def _affine(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]
