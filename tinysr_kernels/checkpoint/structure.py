"""The structure of a pruned UNet and of a pruned KL decoder, read from keys and shapes and checked to fit together.

Serves AdcSR and this project's own layout alike. Block counts, depths, widths, dense or
separable convolutions and the presence of transformers come from the keys; what is checked is that every tensor has the
shape its neighbors imply and that none is left over.
"""

from __future__ import annotations

from tinysr_kernels.checkpoint.read.weights import Weights, conv, linear, norm
from tinysr_kernels.errors import CheckpointError

IMAGE_CHANNELS = 3
LEVELS = 8
"""Most times that a network halves an image, which is padded to a multiple of what it is reduced by."""
BLOCKS, WIDTH, GAIN = 1 << 10, 1 << 16, (1e-4, 1e4)
"""Most blocks of a level; largest width or factor; range of a factor that is no whole number."""


def _resnet(weights: Weights, name: str, inputs: int) -> int:
    norm(weights, f"{name}.norm1", inputs)
    inner = conv(weights, f"{name}.conv1", inputs)
    if weights.has(f"{name}.time_bias"):
        weights.take(f"{name}.time_bias", [inner])
    norm(weights, f"{name}.norm2", inner)
    outputs = conv(weights, f"{name}.conv2", inner)
    if outputs != inputs or weights.has(f"{name}.conv_shortcut.weight"):
        weights.take(f"{name}.conv_shortcut.weight", [outputs, inputs, 1, 1])
        weights.take(f"{name}.conv_shortcut.bias", [outputs])
    return outputs


def _transformer(weights: Weights, name: str, channels: int, head_dim: int) -> None:
    norm(weights, f"{name}.norm", channels)
    width = linear(weights, f"{name}.proj_in", channels)
    depth = weights.count(f"{name}.transformer_blocks")
    if not depth:
        raise CheckpointError(
            f"{weights.where(f'{name}.transformer_blocks.0')}: expected transformer blocks, found none"
        )
    for i in range(depth):
        block = f"{name}.transformer_blocks.{i}"
        norm(weights, f"{block}.norm1", width)
        inner = linear(weights, f"{block}.attn1.to_q", width, bias=False)
        if inner % head_dim:
            raise CheckpointError(
                f"{weights.where(f'{block}.attn1.to_q.weight')}: expected heads of {head_dim}, found width {inner}"
            )
        linear(weights, f"{block}.attn1.to_k", width, inner, bias=False)
        linear(weights, f"{block}.attn1.to_v", width, inner, bias=False)
        linear(weights, f"{block}.attn1.to_out.0", inner, width)
        norm(weights, f"{block}.norm3", width)
        double = linear(weights, f"{block}.ff.net.0.proj", width)
        if double % 2:
            raise CheckpointError(
                f"{weights.where(f'{block}.ff.net.0.proj.weight')}: expected two halves (GEGLU), found {double} outputs"
            )
        linear(weights, f"{block}.ff.net.2", double // 2, width)
    linear(weights, f"{name}.proj_out", width, channels)


def _counts(weights: Weights, block: str) -> tuple[int, int]:
    """Resnets and transformers of a block; transformer j follows resnet j."""
    resnets, attentions = weights.count(f"{block}.resnets"), weights.count(f"{block}.attentions")
    if not resnets:
        raise CheckpointError(f"{weights.where(f'{block}.resnets.0')}: expected resnets, found none")
    if attentions > resnets:
        raise CheckpointError(
            f"{weights.where(f'{block}.attentions')}: expected at most {resnets} transformers, found {attentions}"
        )
    return resnets, attentions


def _middle(weights: Weights, name: str, channels: int) -> tuple[int, int]:
    """The middle's first resnet; returns its output channels and the number of attentions after it, 0 or 1."""
    resnets, attentions = weights.count(f"{name}.resnets"), weights.count(f"{name}.attentions")
    if resnets != 2 or attentions > 1:
        raise CheckpointError(
            f"{weights.where(name)}: expected resnets.0, at most one attention, resnets.1; found {resnets} resnets "
            f"and {attentions} attentions"
        )
    return _resnet(weights, f"{name}.resnets.0", channels), attentions


def check_unet(weights: Weights, head_dim: int, inputs: int) -> int:
    """Take everything under `unet.`: [N,inputs,H,W] -> [N,outputs,H,W]; returns outputs.

    head_dim: width of an attention head.
    """
    channels = conv(weights, "unet.conv_in", inputs)
    level = 0
    skips = [(channels, level)]
    for i in range(weights.count("unet.down_blocks")):
        block = f"unet.down_blocks.{i}"
        resnets, attentions = _counts(weights, block)
        for j in range(resnets):
            channels = _resnet(weights, f"{block}.resnets.{j}", channels)
            if j < attentions:
                _transformer(weights, f"{block}.attentions.{j}", channels, head_dim)
            skips.append((channels, level))
        if weights.has_under(f"{block}.downsamplers"):
            if level == LEVELS:
                raise CheckpointError(f"{weights.where(f'{block}.downsamplers')}: expected at most {LEVELS} reductions")
            channels, level = conv(weights, f"{block}.downsamplers.0.conv", channels), level + 1
            skips.append((channels, level))
    channels, attentions = _middle(weights, "unet.mid_block", channels)
    if attentions:
        _transformer(weights, "unet.mid_block.attentions.0", channels, head_dim)
    channels = _resnet(weights, "unet.mid_block.resnets.1", channels)
    for i in range(weights.count("unet.up_blocks")):
        block = f"unet.up_blocks.{i}"
        resnets, attentions = _counts(weights, block)
        for j in range(resnets):
            channels += _pop_skip(weights, f"{block}.resnets.{j}", skips, level)
            channels = _resnet(weights, f"{block}.resnets.{j}", channels)
            if j < attentions:
                _transformer(weights, f"{block}.attentions.{j}", channels, head_dim)
        if weights.has_under(f"{block}.upsamplers"):
            channels, level = conv(weights, f"{block}.upsamplers.0.conv", channels), level - 1
    if skips or level:
        raise CheckpointError(
            f"{weights.where('unet.up_blocks')}: expected the up blocks to mirror the down blocks, found {len(skips)} "
            f"skip connections unused and {level} enlargements missing"
        )
    norm(weights, "unet.conv_norm_out", channels)
    return conv(weights, "unet.conv_out", channels)


def _pop_skip(weights: Weights, name: str, skips: list[tuple[int, int]], level: int) -> int:
    if not skips:
        raise CheckpointError(f"{weights.where(name)}: unexpected, there is no skip connection left for this resnet")
    channels, found = skips.pop()
    if found != level:
        raise CheckpointError(
            f"{weights.where(name)}: expected a skip connection after {level} reductions, as many as are open "
            f"here, found one after {found}"
        )
    return channels


def check_kl_decoder(weights: Weights, inputs: int, attention: bool = False) -> int:
    """Take everything under `decoder.`: [N,inputs,h,w] -> [N,3,h*2^u,w*2^u]; returns u, the number of upsamplers.

    `attention` says that the middle must have its attention; otherwise the keys decide.
    """
    channels, attentions = _middle(weights, "decoder.mid_block", inputs)
    if attentions or attention:
        name = "decoder.mid_block.attentions.0"
        norm(weights, f"{name}.group_norm", channels)
        width = linear(weights, f"{name}.to_q", channels)
        linear(weights, f"{name}.to_k", channels, width)
        linear(weights, f"{name}.to_v", channels, width)
        linear(weights, f"{name}.to_out.0", width, channels)
    channels = _resnet(weights, "decoder.mid_block.resnets.1", channels)
    upsamplers = 0
    for i in range(weights.count("decoder.up_blocks")):
        block = f"decoder.up_blocks.{i}"
        for j in range(_counts(weights, block)[0]):
            channels = _resnet(weights, f"{block}.resnets.{j}", channels)
        if weights.has_under(f"{block}.upsamplers"):
            channels = conv(weights, f"{block}.upsamplers.0.conv", channels)
            upsamplers += 1
    norm(weights, "decoder.conv_norm_out", channels)
    conv(weights, "decoder.conv_out", channels, IMAGE_CHANNELS)
    return upsamplers


def check_scale(where: str, shrink: int, upsamplers: int, upscale: int = 4) -> None:
    """CheckpointError unless shrinking by `shrink` and then enlarging `upsamplers` times gives `upscale`."""
    if 2**upsamplers != shrink * upscale:
        raise CheckpointError(
            f"{where}: expected a decoder that enlarges by {shrink * upscale} ({shrink} that the input is shrunk by, "
            f"times {upscale}), found {upsamplers} upsamplers"
        )
