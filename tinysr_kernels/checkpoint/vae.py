"""The tiny VAE (diffusers' AutoencoderTiny): its layers checked against the configuration's counts and widths.

`encoder.layers.K` and `decoder.layers.K` are numbered as diffusers' EncoderTiny and DecoderTiny number them, activation
and upsampling layers included; any convolution may be dense or separable.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.read.weights import Weights, conv
from tinysr_kernels.checkpoint.structure import BLOCKS, GAIN, LEVELS, WIDTH
from tinysr_kernels.errors import CheckpointError, shorten

CHANNELS = 3
TINY_VAE = Part(
    "vae",
    "a tiny VAE (keys encoder.layers.*, decoder.layers.*)",
    re.compile(r"^([a-z_]+\.){0,2}(encoder|decoder)\.layers\.[0-9]+\.(conv|weight|depthwise|pointwise|bias)"),
    class_name="AutoencoderTiny",
)
"""A tiny VAE as a part of its own, with the config.json that `layout_from_config` reads."""


@dataclass(frozen=True)
class TinyLayout:
    """What a VAE's configuration says; None for a width it leaves to the weights."""

    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    scaling_factor: float
    encoder_widths: tuple[int, ...] | None = None
    decoder_widths: tuple[int, ...] | None = None
    latent: int | None = None


def layout_from_config(values: dict[str, Any], where: str) -> TinyLayout:
    """Read an AutoencoderTiny's config.json.

    Raises CheckpointError for a value that is missing or that would make another network.
    """
    for name, expected in (("in_channels", 3), ("out_channels", 3), ("upsampling_scaling_factor", 2)):
        if type(values.get(name, expected)) is not int or values.get(name, expected) != expected:
            raise CheckpointError(f"{where}: {name}: expected {expected}, found {quoted(values[name])}")
    for name, text in (("act_fn", "relu"), ("upsample_fn", "nearest")):
        if values.get(name, text) != text:
            raise CheckpointError(f"{where}: {name}: expected {text!r}, found {quoted(values[name])}")
    scaling = values.get("scaling_factor")
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not GAIN[0] <= scaling <= GAIN[1]:
        raise CheckpointError(
            f"{where}: scaling_factor: expected a number from {GAIN[0]:g} to {GAIN[1]:g}, found {quoted(scaling)}"
        )
    latent = values.get("latent_channels")
    if latent is not None and (type(latent) is not int or latent < 1):
        raise CheckpointError(f"{where}: latent_channels: expected a positive integer, found {quoted(latent)}")
    encoder, decoder = (_sizes(values, f"num_{part}_blocks", where, BLOCKS) for part in ("encoder", "decoder"))
    if encoder is None or decoder is None:
        raise CheckpointError(f"{where}: expected num_encoder_blocks and num_decoder_blocks, found neither or one")
    widths = [_sizes(values, f"{part}_block_out_channels", where, WIDTH) for part in ("encoder", "decoder")]
    for part, blocks, found in (("encoder", encoder, widths[0]), ("decoder", decoder, widths[1])):
        if found is not None and len(found) != len(blocks):
            raise CheckpointError(
                f"{where}: {part}_block_out_channels: expected {len(blocks)} widths, found {len(found)}"
            )
    return TinyLayout(encoder, decoder, float(scaling), widths[0], widths[1], latent)


def _sizes(values: dict[str, Any], name: str, where: str, most: int) -> tuple[int, ...] | None:
    found = values.get(name)
    if found is None:
        return None
    if not isinstance(found, (list, tuple)) or not 0 < len(found) <= LEVELS:
        length = f"{len(found)} entries" if isinstance(found, (list, tuple)) else quoted(found)
        raise CheckpointError(f"{where}: {name}: expected a list of 1 to {LEVELS} positive integers, found {length}")
    if not all(type(n) is int and 0 < n <= most for n in found):
        raise CheckpointError(f"{where}: {name}: expected positive integers up to {most}, found {quoted(found)}")
    return tuple(found)


def _check_blocks(weights: Weights, prefix: str, blocks: Sequence[int], expected: list[int]) -> None:
    """The layers that the keys show to be residual blocks are those that the configuration's counts make them."""
    pattern = re.compile(re.escape(prefix) + r"\.([0-9]{1,4})\.conv\.")
    found = sorted({int(m.group(1)) for name in weights.names() if (m := pattern.match(name))})
    if found != expected:
        raise CheckpointError(
            f"{weights.where(prefix)}: block counts {tuple(blocks)} put residual blocks at layers "
            f"{shorten(expected)}, found them at {shorten(found)}"
        )


def _block(weights: Weights, name: str, width: int) -> None:
    """relu(conv.4(relu(conv.2(relu(conv.0(x))))) + x): the outer width is kept, the inner ones are free."""
    inner = conv(weights, f"{name}.conv.0", width)
    inner = conv(weights, f"{name}.conv.2", inner)
    conv(weights, f"{name}.conv.4", inner, width)


def _width(widths: Sequence[int] | None, stage: int) -> int | None:
    return None if widths is None else widths[stage]


def check_encoder(
    weights: Weights, prefix: str, blocks: Sequence[int], widths: Sequence[int] | None, latent: int | None
) -> int:
    """Take the encoder under `prefix` ("encoder.layers"): image [N,3,H,W] -> [N,Z,H/s,W/s]; returns Z."""
    starts = [sum(blocks[:stage]) + stage for stage in range(len(blocks))]
    expected = [start + 1 + i for start, n in zip(starts, blocks, strict=True) for i in range(n)]
    _check_blocks(weights, prefix, blocks, expected)
    channels = CHANNELS
    for stage, (start, number) in enumerate(zip(starts, blocks, strict=True)):
        channels = conv(weights, f"{prefix}.{start}", channels, _width(widths, stage), bias=stage == 0)
        for i in range(number):
            _block(weights, f"{prefix}.{start + 1 + i}", channels)
    return conv(weights, f"{prefix}.{sum(blocks) + len(blocks)}", channels, latent)


def check_decoder(
    weights: Weights, prefix: str, blocks: Sequence[int], widths: Sequence[int] | None, latent: int | None
) -> int:
    """Take the decoder under `prefix` ("decoder.layers"): latent [N,Z,h,w] -> [N,3,h*s,w*s]; returns Z."""
    starts = [2 + sum(blocks[:stage]) + 2 * stage for stage in range(len(blocks))]
    expected = [start + i for start, n in zip(starts, blocks, strict=True) for i in range(n)]
    _check_blocks(weights, prefix, blocks, expected)
    inputs = latent
    if inputs is None:
        first = f"{prefix}.0.depthwise.weight"
        inputs = weights.shape(first)[0] if weights.has(first) else (*weights.shape(f"{prefix}.0.weight"), 0, 0)[1]
    channels = conv(weights, f"{prefix}.0", inputs, _width(widths, 0))
    for stage, (start, number) in enumerate(zip(starts, blocks, strict=True)):
        for i in range(number):
            _block(weights, f"{prefix}.{start + i}", channels)
        last = stage == len(blocks) - 1
        # After the blocks comes an upsampling layer without weights, except in the last stage.
        layer = start + number + (0 if last else 1)
        outputs = CHANNELS if last else _width(widths, stage + 1)
        channels = conv(weights, f"{prefix}.{layer}", channels, outputs, bias=last)
    return inputs


def check_tiny_vae(weights: Weights, layout: TinyLayout) -> int:
    """Take a whole tiny VAE, `encoder.layers.*` and `decoder.layers.*`; returns its latent channels.

    Raises CheckpointError naming the tensor when keys, widths or the two halves' scales disagree.
    """
    if len(layout.encoder_blocks) != len(layout.decoder_blocks):
        raise CheckpointError(
            f"{weights.where('decoder.layers')}: expected as many stages as the encoder's "
            f"{len(layout.encoder_blocks)}, found {len(layout.decoder_blocks)}: the halves differ in scale"
        )
    latent = check_encoder(weights, "encoder.layers", layout.encoder_blocks, layout.encoder_widths, layout.latent)
    return check_decoder(weights, "decoder.layers", layout.decoder_blocks, layout.decoder_widths, latent)
