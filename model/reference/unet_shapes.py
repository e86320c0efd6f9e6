"""Names and shapes of regular pruned UNets and KL decoders, from a few numbers: what to build a new network from."""

from __future__ import annotations

from collections.abc import Sequence

Shape = tuple[int, ...]


def convolution_shapes(name: str, inputs: int, outputs: int, separable: bool) -> dict[str, Shape]:
    """A 3x3 convolution with bias, dense or separable."""
    if not separable:
        return {f"{name}.weight": (outputs, inputs, 3, 3), f"{name}.bias": (outputs,)}
    return {
        f"{name}.depthwise.weight": (inputs, 1, 3, 3),
        f"{name}.pointwise.weight": (outputs, inputs, 1, 1),
        f"{name}.pointwise.bias": (outputs,),
    }


def _affine(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def resnet_shapes(name: str, inputs: int, outputs: int, separable: bool, time_bias: bool = False) -> dict[str, Shape]:
    """A residual block; a 1x1 shortcut where the widths differ, `time_bias` [O] on request."""
    shapes = {
        **_affine(f"{name}.norm1", inputs),
        **convolution_shapes(f"{name}.conv1", inputs, outputs, separable),
        **_affine(f"{name}.norm2", outputs),
        **convolution_shapes(f"{name}.conv2", outputs, outputs, separable),
    }
    if inputs != outputs:
        shapes |= _affine(f"{name}.conv_shortcut", outputs, inputs, 1, 1)
    if time_bias:
        shapes[f"{name}.time_bias"] = (outputs,)
    return shapes


def transformer_shapes(name: str, width: int) -> dict[str, Shape]:
    """A transformer of one block: self attention and a GEGLU feed-forward of four times the width."""
    block = f"{name}.transformer_blocks.0"
    return {
        **_affine(f"{name}.norm", width),
        **_affine(f"{name}.proj_in", width, width),
        **_affine(f"{block}.norm1", width),
        **{f"{block}.attn1.to_{part}.weight": (width, width) for part in "qkv"},
        **_affine(f"{block}.attn1.to_out.0", width, width),
        **_affine(f"{block}.norm3", width),
        **_affine(f"{block}.ff.net.0.proj", 8 * width, width),
        **_affine(f"{block}.ff.net.2", width, 4 * width),
        **_affine(f"{name}.proj_out", width, width),
    }


def unet_shapes(
    inputs: int,
    outputs: int,
    channels: Sequence[int],
    layers: int,
    *,
    separable: bool = False,
    transformers: Sequence[bool] | None = None,
    time_bias: bool = False,
) -> dict[str, Shape]:
    """A UNet of one level per entry of `channels`: `layers` resnets per down block, one more per up block.

    `transformers` says per level whether a transformer follows each resnet (none by default); if any level has them,
    so has the middle block, as in SD 2.1, where only the last level goes without.
    """
    transformers = tuple(transformers or (False,) * len(channels))
    return {
        **convolution_shapes("conv_in", inputs, channels[0], separable),
        **_down_shapes(channels, layers, separable, transformers, time_bias),
        **_middle_shapes(channels[-1], separable, any(transformers), time_bias),
        **_up_shapes(channels, layers, separable, transformers, time_bias),
        **_affine("conv_norm_out", channels[0]),
        **convolution_shapes("conv_out", channels[0], outputs, separable),
    }


def _down_shapes(
    channels: Sequence[int], layers: int, separable: bool, transformers: Sequence[bool], time_bias: bool
) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}
    inputs = channels[0]
    for i, width in enumerate(channels):
        for j in range(layers):
            shapes |= resnet_shapes(f"down_blocks.{i}.resnets.{j}", inputs, width, separable, time_bias)
            if transformers[i]:
                shapes |= transformer_shapes(f"down_blocks.{i}.attentions.{j}", width)
            inputs = width
        if i < len(channels) - 1:
            shapes |= convolution_shapes(f"down_blocks.{i}.downsamplers.0.conv", width, width, separable)
    return shapes


def _middle_shapes(width: int, separable: bool, transformer: bool, time_bias: bool) -> dict[str, Shape]:
    return {
        **resnet_shapes("mid_block.resnets.0", width, width, separable, time_bias),
        **(transformer_shapes("mid_block.attentions.0", width) if transformer else {}),
        **resnet_shapes("mid_block.resnets.1", width, width, separable, time_bias),
    }


def _up_shapes(
    channels: Sequence[int], layers: int, separable: bool, transformers: Sequence[bool], time_bias: bool
) -> dict[str, Shape]:
    # The skips in the order in which they were left; the up path takes the last one first.
    skips = [channels[0]]
    for i, width in enumerate(channels):
        skips += [width] * (layers + (i < len(channels) - 1))
    shapes: dict[str, Shape] = {}
    inputs = channels[-1]
    for i, (width, attend) in enumerate(zip(reversed(channels), reversed(transformers), strict=True)):
        for j in range(layers + 1):
            name = f"up_blocks.{i}.resnets.{j}"
            shapes |= resnet_shapes(name, inputs + skips.pop(), width, separable, time_bias)
            if attend:
                shapes |= transformer_shapes(f"up_blocks.{i}.attentions.{j}", width)
            inputs = width
        if i < len(channels) - 1:
            shapes |= convolution_shapes(f"up_blocks.{i}.upsamplers.0.conv", width, width, separable)
    return shapes


def decoder_shapes(
    channels: Sequence[int], layers: int, *, separable: bool = False, attention: bool = True
) -> dict[str, Shape]:
    """A KL decoder with `channels` in config order (narrowest first) and `layers` resnets per up block."""
    widest = channels[-1]
    shapes = resnet_shapes("mid_block.resnets.0", widest, widest, separable)
    if attention:
        shapes |= _affine("mid_block.attentions.0.group_norm", widest)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _affine(f"mid_block.attentions.0.{part}", widest, widest)
    shapes |= resnet_shapes("mid_block.resnets.1", widest, widest, separable)
    inputs = widest
    for i, width in enumerate(reversed(channels)):
        for j in range(layers):
            shapes |= resnet_shapes(f"up_blocks.{i}.resnets.{j}", inputs, width, separable)
            inputs = width
        if i < len(channels) - 1:
            shapes |= convolution_shapes(f"up_blocks.{i}.upsamplers.0.conv", width, width, separable)
    # Three output channels: a separable convolution would save nothing worth its second pass.
    return {
        **shapes,
        **_affine("conv_norm_out", channels[0]),
        **convolution_shapes("conv_out", channels[0], 3, separable=False),
    }
