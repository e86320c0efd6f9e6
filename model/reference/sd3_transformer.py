"""SD3's joint transformer in plain PyTorch: the teacher that TinySR's network is cut from.

Image and prompt are two streams of tokens with weights of their own that meet in every block's attention; the last
block reads the prompt but does not update it. Parameter names are those of diffusers' SD3Transformer2DModel, against
which the order of operations was checked (models/transformers/transformer_sd3.py, attention.py, normalization.py);
dual attention and normalized queries and keys (SD 3.5) are left out, for TSD-SR builds on SD3-medium.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.tinysr_dit import Attention, FeedForward, Modulation, TimeTextEmbed, modulated_norm, position_table


@dataclass(frozen=True)
class SD3Config:
    """The fields of config.json that decide the network; the defaults are SD3-medium's."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 24
    attention_head_dim: int = 64
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 192

    @property
    def dim(self) -> int:
        return self.attention_head_dim * self.num_attention_heads


class JointAttention(Attention):
    """Attention over the tokens of both streams together, each with projections of its own; [N,T,D], [N,P,D]."""

    def __init__(self, dim: int, head_dim: int, last: bool) -> None:
        super().__init__(dim, head_dim)
        self.add_q_proj = nn.Linear(dim, dim)
        self.add_k_proj = nn.Linear(dim, dim)
        self.add_v_proj = nn.Linear(dim, dim)
        self.to_add_out = None if last else nn.Linear(dim, dim)

    def joint(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the image's tokens and (but for the last block) the prompt's tokens receive."""
        image = (self.to_q, self.to_k, self.to_v)
        prompt = (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (
            torch.cat([a(x), b(context)], dim=1).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for a, b in zip(image, prompt, strict=True)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        mine, theirs = mixed.split([x.shape[1], context.shape[1]], dim=1)
        return self.to_out[0](mine), None if self.to_add_out is None else self.to_add_out(theirs)


class JointBlock(nn.Module):
    """One block of both streams; the last one (`last`) leaves the prompt as it is."""

    def __init__(self, dim: int, head_dim: int, last: bool) -> None:
        super().__init__()
        self.norm1 = Modulation(dim, 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, head_dim, last)
        self.ff = FeedForward(dim)
        self.ff_context = None if last else FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.norm1(temb)
        if self.ff_context is None:
            # Scale first: this norm is built like the network's last one.
            c_scale, c_shift = self.norm1_context(temb)
        else:
            c_shift, c_scale, c_gate, c_shift_ff, c_scale_ff, c_gate_ff = self.norm1_context(temb)
        mine, theirs = self.attn.joint(modulated_norm(x, scale, shift), modulated_norm(context, c_scale, c_shift))
        x = x + gate[:, None] * mine
        x = x + gate_ff[:, None] * self.ff(modulated_norm(x, scale_ff, shift_ff))
        if self.ff_context is not None and theirs is not None:
            context = context + c_gate[:, None] * theirs
            context = context + c_gate_ff[:, None] * self.ff_context(modulated_norm(context, c_scale_ff, c_shift_ff))
        return x, context


class CroppedPatchEmbed(nn.Module):
    """Patch convolution plus the center crop of the position table [1,M*M,D] that fits the latent."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.side = config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.dim, config.patch_size, config.patch_size)
        base = config.sample_size // config.patch_size
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", position_table(config.dim, self.side, self.side, base))

    def forward(self, z: Tensor) -> Tensor:
        x = self.proj(z)
        return x.flatten(2).transpose(1, 2) + crop_table(self.pos_embed, x.shape[2], x.shape[3])


def crop_table(table: Tensor, height: int, width: int) -> Tensor:
    """The center [1,height*width,D] of a square position table [1,M*M,D]; ValueError if it is too small."""
    side = math.isqrt(table.shape[1])
    if side * side != table.shape[1] or max(height, width) > side:
        raise ValueError(f"no {height}x{width} positions in a table of {table.shape[1]}")
    top, left = (side - height) // 2, (side - width) // 2
    square = table.unflatten(1, (side, side))[:, top : top + height, left : left + width]
    return square.flatten(1, 2)


class SD3Transformer(nn.Module):
    """z [N,C,H,W], prompt tokens [1 or N,P,J], pooled prompt [1 or N,L] -> the velocity [N,C,H,W] at t = 1000."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.config = config
        self.pos_embed = CroppedPatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config.pooled_projection_dim, config.dim)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(config.dim, config.attention_head_dim, i == config.num_layers - 1)
            for i in range(config.num_layers)
        )
        self.norm_out = Modulation(config.dim, 2)
        self.proj_out = nn.Linear(config.dim, config.patch_size**2 * config.out_channels)

    def forward(self, z: Tensor, prompt: Tensor, pooled: Tensor) -> Tensor:
        temb = self.time_text_embed(pooled)
        x = self.pos_embed(z)
        context = self.context_embedder(prompt).expand(len(z), -1, -1)
        for block in self.transformer_blocks:
            x, context = block(x, context, temb)
        scale, shift = self.norm_out(temb)
        x = self.proj_out(modulated_norm(x, scale, shift))
        p = self.config.patch_size
        patches = x.unflatten(2, (p, p, -1)).unflatten(1, (z.shape[2] // p, z.shape[3] // p))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(z), -1, *z.shape[2:])

    def config_json(self) -> dict[str, Any]:
        """config.json as diffusers writes it."""
        values = {name: getattr(self.config, name) for name in self.config.__dataclass_fields__}
        return {"_class_name": "SD3Transformer2DModel", **values}
