"""Toy-SR, a family that docs/add-a-family.md adds step by step: convolutions, one nearest x2 and one more a doubling.

h = head(2 LR - 1);  h = relu(strength * body_i(h) + h) for each i;  h = relu(up_j(nearest x2(h))) for each j
SR = tail(h) / 2 + 1/2
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.read.weights import Weights, conv
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Checkpoint, ColorFix, Family, Found
from tinysr_kernels.nets import PixelNetwork
from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Conv, InputConv, count

TOY = Part(
    "toy",
    "a Toy-SR network (keys toy.head.*, toy.body.*, toy.up.*, toy.tail.*)",
    re.compile(r"^toy\.(head|body|up|tail)\."),
    class_name="ToySRModel",
)


@dataclass(frozen=True)
class ToyConfig:
    """What Toy-SR's weights leave open."""

    strength: float = 1.0
    color_fix: ColorFix = "wavelet"


class ToySR(Family[ToyConfig]):
    """Recognized by its keys; `strength` is in the config.json beside the weights."""

    name = "toy-sr"
    summary = "a Toy-SR file"
    parts = (TOY,)
    config_class = ToyConfig
    dtype = "bfloat16"

    def read(self, found: Found) -> Checkpoint:
        """Widths and depths follow from the keys; every tensor is checked, and none may be left over."""
        part = found.parts[TOY.role]
        strength = (part.config or {}).get("strength", ToyConfig.strength)
        if not isinstance(strength, float) or not 0 < strength < math.inf:
            where = f"{part.config_where}: strength"
            raise CheckpointError(f"{where}: expected a positive number, found {quoted(strength)}")
        tensors = {name.removeprefix("toy."): tensor for name, tensor in part.file.only_tensors().items()}
        weights = Weights(tensors, lambda name: f"{part.file.where}: {quoted(f'toy.{name}')}")
        width = conv(weights, "head", 3)
        for i in range(weights.count("body")):
            conv(weights, f"body.{i}", width, width)
        for j in range(weights.count("up")):
            conv(weights, f"up.{j}", width, width)
        conv(weights, "tail", width, 3)
        return Checkpoint(self.name, ToyConfig(strength), weights.finish(), notices=found.notices, source=found.source)

    def fold(self, config: ToyConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """2 LR - 1 into the head, the strength into the body, / 2 + 1/2 into the tail, nearest x2 into four phases."""
        f = Folder(tensors, dtype)
        f.input_conv("head", "head", signed_range=True)
        for i in range(count(tensors, "body")):
            f.conv(f"body.{i}", f"body.{i}", scale=config.strength)
        for j in range(count(tensors, "up")):
            f.conv(f"up.{j}", f"up.{j}", upsample=True)
        f.conv("tail", "tail", scale=0.5, extra_bias=0.5)
        return f.folded

    def build(self, config: ToyConfig, folded: Mapping[str, Tensor]) -> PixelNetwork:
        """It takes the image whole, or in blended tiles."""
        return ToyNetwork(folded)


class ToyNetwork(PixelNetwork):
    """Every layer is one operator of `tinysr_kernels.ops`, with its activation and residual fused."""

    def __init__(self, folded: Mapping[str, Tensor]) -> None:
        ups = count(folded, "up")
        super().__init__(upscale=2**ups)
        self.head = InputConv(folded, "head", border=0.5)  # where the padding of 2 LR - 1 was zero, LR is one half
        self.body = nn.ModuleList(Conv(folded, f"body.{i}") for i in range(count(folded, "body")))
        self.up = nn.ModuleList(Conv(folded, f"up.{j}", upsample=True) for j in range(ups))
        self.tail = Conv(folded, "tail")

    def forward(self, image: Tensor) -> Tensor:
        """[N,3,H,W] in [0,1] or uint8 -> [N,3,s*H,s*W], [0,1] up to overshoot."""
        h = self.head(image)
        for layer in self.body:
            h = layer(h, activation="relu", residual=h)
        for layer in self.up:
            h = layer(h, activation="relu")
        return self.tail(h)
