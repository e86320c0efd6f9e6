"""Stable Diffusion 3's transformer (diffusers' SD3Transformer2DModel): its config.json, and its tensors checked.

The names and shapes: diffusers models/transformers/transformer_sd3.py, attention.py. What would make another network
(normalized queries and keys, dual attention: Stable Diffusion 3.5) is refused by its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.embeddings import position_table
from tinysr_kernels.checkpoint.modulation import EMBEDDER
from tinysr_kernels.checkpoint.read.weights import Weights, linear
from tinysr_kernels.checkpoint.sd.values import Values
from tinysr_kernels.errors import CheckpointError

SD3 = Part(
    "sd3-transformer",
    "a Stable Diffusion 3 transformer (keys transformer_blocks.*.attn.add_k_proj.*)",
    re.compile(r"^transformer_blocks\.[0-9]+\.attn\.add_k_proj\."),
    names=("transformer",),
    class_name="SD3Transformer2DModel",
)
TABLE = "pos_embed.pos_embed"
MOST_BLOCKS, MOST_SIDE = 256, 1024
_NOT_3_5 = "Stable Diffusion 3.5 is not supported, only 3"
_ONLY_3: Mapping[str, tuple[Any, ...]] = {"qk_norm": (None,), "dual_attention_layers": ((), [], None)}


@dataclass(frozen=True)
class Size:
    """What an SD3 transformer's config.json says.

    prompt: features of the prompt's embedding. pooled: of the pooled one. side: tokens per side of the position table.
    base: the side, in tokens, that the table's coordinates belong to.
    """

    depth: int
    heads: int
    head_dim: int
    patch: int
    channels: int
    prompt: int
    pooled: int
    side: int
    base: int

    @property
    def dim(self) -> int:
        """Features of a token."""
        return self.heads * self.head_dim


def size_from_config(config: Mapping[str, Any], where: str) -> Size:
    """Read an SD3Transformer2DModel's config.json.

    Raises CheckpointError naming the value that is missing, absurd, or that would make another network.
    """
    values = Values(config, where)
    for name, allowed in _ONLY_3.items():
        if config.get(name) not in allowed:
            raise values.refuse(name, f"none ({_NOT_3_5})")
    size = Size(
        values.whole("num_layers", 18, MOST_BLOCKS),
        values.whole("num_attention_heads", 18),
        values.whole("attention_head_dim", 64),
        values.whole("patch_size", 2, 64),
        values.whole("in_channels", 16, 64),
        values.whole("joint_attention_dim", 4096),
        values.whole("pooled_projection_dim", 2048),
        values.whole("pos_embed_max_size", 96, MOST_SIDE),
        max(values.whole("sample_size", 128) // values.whole("patch_size", 2, 64), 1),
    )
    outputs = config.get("out_channels")
    if outputs is not None and (type(outputs) is not int or outputs != size.channels):
        raise values.refuse("out_channels", f"{size.channels}, as in_channels says")
    if values.whole("caption_projection_dim", 1152) != size.dim:
        raise values.refuse("caption_projection_dim", f"{size.dim}, the width of a token")
    if size.dim % 4:
        raise values.refuse("attention_head_dim", "a width of tokens that is a multiple of 4")
    return size


def check(weights: Weights, size: Size) -> None:
    """Take every tensor but the position table; CheckpointError naming one that is missing or of another shape."""
    dim = size.dim
    weights.take("pos_embed.proj.weight", [dim, size.channels, size.patch, size.patch])
    weights.take("pos_embed.proj.bias", [dim])
    time = (*weights.shape(f"{EMBEDDER}.timestep_embedder.linear_1.weight"), 0, 0)[1]
    if time < 2 or time % 2:
        where = weights.where(f"{EMBEDDER}.timestep_embedder.linear_1.weight")
        raise CheckpointError(f"{where}: expected an even number of inputs, found {time}")
    for name, inputs in (("timestep_embedder", time), ("text_embedder", size.pooled)):
        hidden = linear(weights, f"{EMBEDDER}.{name}.linear_1", inputs)
        linear(weights, f"{EMBEDDER}.{name}.linear_2", hidden, dim)
    linear(weights, "context_embedder", size.prompt, dim)
    for i in range(size.depth):
        _check_block(weights, f"transformer_blocks.{i}", dim, last=i == size.depth - 1)
    linear(weights, "norm_out.linear", dim, 2 * dim)
    linear(weights, "proj_out", dim, size.patch**2 * size.channels)


def _check_block(weights: Weights, block: str, dim: int, *, last: bool) -> None:
    """The last block updates the image alone: no output projection and no feed-forward of the text."""
    linear(weights, f"{block}.norm1.linear", dim, 6 * dim)
    linear(weights, f"{block}.norm1_context.linear", dim, (2 if last else 6) * dim)
    projections = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj"]
    for name in projections if last else [*projections, "to_add_out"]:
        linear(weights, f"{block}.attn.{name}", dim, dim)
    for name in ["ff"] if last else ["ff", "ff_context"]:
        hidden = linear(weights, f"{block}.{name}.net.0.proj", dim)
        linear(weights, f"{block}.{name}.net.2", hidden, dim)


def table(weights: Weights, size: Size, window: int, notices: list[str]) -> Tensor:
    """The position table [1,S*S,D] of a latent of `window` pixels a side, S = window / patch: the stored one's center.

    Computed from the configuration, and noted, where none is stored. CheckpointError where it is too small.
    """
    side = window // size.patch
    if window % size.patch or size.side < side:
        raise CheckpointError(
            f"{weights.where(TABLE)}: expected positions for {window}x{window} latent pixels in patches of "
            f"{size.patch}, found {size.side}x{size.side}"
        )
    if not weights.has(TABLE):
        notices.append(f"{weights.where(TABLE)}: not there, computed from pos_embed_max_size {size.side}")
        return position_table(size.dim, side, size.base, size.side)
    stored = weights.take(TABLE, [1, size.side**2, size.dim])
    first = (size.side - side) // 2
    square = stored.unflatten(1, (size.side, math.isqrt(stored.shape[1])))
    return square[:, first : first + side, first : first + side].flatten(1, 2)
