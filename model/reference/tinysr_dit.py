"""TinySR's transformer (arXiv 2508.17434) in plain PyTorch: SD3's blocks, image stream only, few of them.

The network predicts, from the latent of the enlarged image, what to subtract from it. It runs at one time
step with one prompt, so everything those two decide (the embedding `temb`, each block's six modulation
vectors, the last norm's two) is constant: `cache_modulation` evaluates it once and drops the modules, as the
public code does in its first forward. Names of parameters and buffers are the public checkpoint's.

The order of operations was checked against the public code (github.com/Microtreei/TinySR,
models/tinysr/tinysd3.py and tinysd3block.py) and against diffusers' SD3 modules (models/embeddings.py,
attention.py, normalization.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinysr_kernels.families import TinySRConfig

TIMESTEP = 1000.0
TIME_CHANNELS = 256
NORM_EPS = 1e-6
BLOCK_MODULATION = ("shift_msa", "scale_msa", "gate_msa", "shift_mlp", "scale_mlp", "gate_mlp")
OUT_MODULATION = ("scale", "shift")

CONTEXT_LEFTOVER = re.compile(
    r"(^|\.)(context_embedder|add_[qkv]_proj|ff_context|norm1_context|to_add_out|norm_added_[qk])\."
)
"""Modules of SD3's context stream; checkpoints cut from SD3 may still carry their weights."""


def timestep_embedding(t: float = TIMESTEP) -> Tensor:
    """[1,256] float64: cos, then sin, of t * 10000^(-i/128), i = 0..127.

    In float64 on purpose: t * frequency reaches 1000, where float32 leaves angles uncertain by 3e-5.
    """
    half = TIME_CHANNELS // 2
    angles = t * torch.exp(-math.log(10000.0) / half * torch.arange(half, dtype=torch.float64))
    return torch.cat([angles.cos(), angles.sin()])[None]


def position_table(dim: int, side: int, max_size: int, base: int) -> Tensor:
    """[1, side*side, dim] float32: the center crop of SD3's sin-cos table of side `max_size`.

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines,
    at the frequencies 10000^(-k / (dim/4)). Coordinates run from 0 to `base`. Raises ValueError if the crop
    does not fit.
    """
    if side > max_size:
        raise ValueError(f"a table of side {side} cannot be cut from one of side {max_size}")
    start = (max_size - side) // 2
    place = torch.arange(start, start + side, dtype=torch.float64) / (max_size / base)
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = place[:, None] * frequency
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column = axis[None].expand(side, side, -1)
    row = axis[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, dim).float()


class Embedder(nn.Module):
    """linear_2(SiLU(linear_1(x))); x [N,I] -> [N,D]."""

    def __init__(self, inputs: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(inputs, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class TimeTextEmbed(nn.Module):
    """temb [1,D], before any SiLU, from the pooled prompt embedding [1,P] at the one time step."""

    def __init__(self, pooled_dim: int, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(TIME_CHANNELS, dim)
        self.text_embedder = Embedder(pooled_dim, dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(timestep_embedding().to(pooled)) + self.text_embedder(pooled)


class Modulation(nn.Module):
    """linear(SiLU(temb)) in `parts` vectors [1,D]."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(temb)).chunk(self.parts, dim=1)


class PatchEmbed(nn.Module):
    """Patch convolution, tokens row by row, plus the table as stored; z [N,C,H,W] -> [N,T,D]."""

    def __init__(self, channels: int, dim: int, patch_size: int, table: Tensor) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", table)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2) + self.pos_embed


class Attention(nn.Module):
    """Self attention over tokens [N,T,D], not causal, in heads of `head_dim`, scale 1/sqrt(head_dim)."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GELU(nn.Module):
    """proj, then GELU in its tanh approximation."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """Linear to 4D, tanh-GELU, linear to D; number 1 of the public names is a dropout, idle here."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without affine, eps 1e-6, times (1 + scale), plus shift; x [N,T,D], scale and shift [1,D]."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """x += gate_msa * attn(norm(x)); x += gate_mlp * ff(norm(x)), both norms modulated; tokens [N,T,D]."""

    shift_msa: Tensor
    scale_msa: Tensor
    gate_msa: Tensor
    shift_mlp: Tensor
    scale_mlp: Tensor
    gate_mlp: Tensor

    def __init__(self, dim: int, head_dim: int, cached: bool) -> None:
        super().__init__()
        self.norm1 = None if cached else Modulation(dim, len(BLOCK_MODULATION))
        self.attn = Attention(dim, head_dim)
        self.ff = FeedForward(dim)
        _register(self, BLOCK_MODULATION, dim if cached else 0)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        modulation = _modulation(self, BLOCK_MODULATION, self.norm1, temb)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x = x + gate_msa[:, None] * self.attn(modulated_norm(x, scale_msa, shift_msa))
        return x + gate_mlp[:, None] * self.ff(modulated_norm(x, scale_mlp, shift_mlp))


class TinySRTransformer(nn.Module):
    """z [N,C,S,S] -> the prediction to subtract from it, same shape; S = `window` = table side * patch size.

    The defaults are the released network's. `table` is the side of the position table in tokens, cut from
    SD3's table of side `pos_embed_max_size`. `pooled_dim=None` leaves out the embedders (then temb must be
    given); `cached=True` builds the network as it is after `cache_modulation`, its buffers to be loaded.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        *,
        dim: int = 1536,
        layers: int = 12,
        head_dim: int = 64,
        channels: int = 16,
        patch_size: int = 2,
        pooled_dim: int | None = 2048,
        table: int = 32,
        sample_size: int = 128,
        pos_embed_max_size: int = 192,
        cached: bool = False,
    ) -> None:
        super().__init__()
        if dim % head_dim or dim % 4:
            raise ValueError(f"width {dim} must be a multiple of the head width {head_dim} and of 4")
        self.patch_size = patch_size
        self.window = table * patch_size
        positions = position_table(dim, table, pos_embed_max_size, sample_size // patch_size)
        self.pos_embed = PatchEmbed(channels, dim, patch_size, positions)
        embedders = pooled_dim is not None and not cached
        self.time_text_embed = TimeTextEmbed(pooled_dim, dim) if embedders and pooled_dim else None
        self.transformer_blocks = nn.ModuleList(Block(dim, head_dim, cached) for _ in range(layers))
        self.norm_out = None if cached else Modulation(dim, len(OUT_MODULATION))
        _register(self, OUT_MODULATION, dim if cached else 0)
        self.proj_out = nn.Linear(dim, patch_size * patch_size * channels)

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        config: TinySRConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TinySRTransformer:
        """The network that a public state dict describes, loaded in `dtype`; sizes from the shapes.

        Remaining tensors of SD3's context stream are ignored. Raises KeyError for a tensor the sizes are read from,
        RuntimeError (naming them) for other missing or unexpected tensors, ValueError for a table that is not
        square.
        """
        config = config or TinySRConfig()
        state = {k: v for k, v in tensors.items() if not CONTEXT_LEFTOVER.search(k)}
        dim, channels, patch_size = state["pos_embed.proj.weight"].shape[:3]
        tokens = state["pos_embed.pos_embed"].shape[1]
        table = math.isqrt(tokens)
        if table * table != tokens:
            raise ValueError(f"pos_embed.pos_embed holds {tokens} positions, which is no square")
        text = state.get("time_text_embed.text_embedder.linear_1.weight")
        model = cls(
            dim=dim,
            layers=1 + max(int(k.split(".")[1]) for k in state if k.startswith("transformer_blocks.")),
            head_dim=config.head_dim,
            channels=channels,
            patch_size=patch_size,
            pooled_dim=None if text is None else text.shape[1],
            table=table,
            pos_embed_max_size=table,
            cached="norm_out.linear.weight" not in state,
        ).to(dtype)
        model.load_state_dict(state)
        return model.requires_grad_(False)

    @torch.no_grad()
    def cache_modulation(self, *, pooled: Tensor | None = None, temb: Tensor | None = None) -> TinySRTransformer:
        """Fill the buffers from the pooled embedding [1,P] or temb [1,D], drop the modules, return self.

        Raises ValueError if the buffers are filled already or if not exactly one of the two is given.
        """
        temb = self.conditioning(pooled, temb)
        if temb is None:
            raise ValueError("the modulation is cached already")
        for block in self.transformer_blocks:
            if isinstance(block, Block):
                _cache(block, BLOCK_MODULATION, block.norm1, temb)
                block.norm1 = None
        _cache(self, OUT_MODULATION, self.norm_out, temb)
        self.norm_out = None
        self.time_text_embed = None
        return self

    def conditioning(self, pooled: Tensor | None, temb: Tensor | None) -> Tensor | None:
        """temb [1,D] from the one that is given, None once modulation is cached; ValueError otherwise."""
        if self.norm_out is None:
            return None
        if (pooled is None) == (temb is None):
            raise ValueError("give either the pooled embedding or temb")
        if temb is not None:
            return temb
        if self.time_text_embed is None:
            raise ValueError("this network has no embedders: give temb")
        return self.time_text_embed(pooled)

    def forward(self, z: Tensor, *, pooled: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
        """[N,C,window,window] -> same; without cached modulation, `pooled` or `temb` must be given."""
        if z.shape[2:] != (self.window, self.window):
            raise ValueError(f"the latent must be {self.window}x{self.window}, found {tuple(z.shape[2:])}")
        temb = self.conditioning(pooled, temb)
        x = self.pos_embed(z)
        for block in self.transformer_blocks:
            x = block(x, temb)
        return self.finish(x, temb)

    def finish(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """From the last block's tokens [N,T,D] to the prediction [N,C,window,window]."""
        scale, shift = _modulation(self, OUT_MODULATION, self.norm_out, temb)
        x = self.proj_out(modulated_norm(x, scale, shift))
        p, side = self.patch_size, self.window // self.patch_size
        patches = x.unflatten(2, (p, p, -1)).unflatten(1, (side, side))
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, self.window, self.window)

    def normalized_state(self) -> dict[str, Tensor]:
        """The tensors of the normalized checkpoint, `transformer.*`; needs cached modulation.

        `transformer_blocks.i.modulation` is [6,D] in the order shift, scale, gate of the attention, then of
        the feed-forward; `norm_out.modulation` is [2,D]: scale, shift. Raises ValueError if nothing is
        cached.
        """
        if self.norm_out is not None:
            raise ValueError("cache the modulation first")
        out = {}
        for name, tensor in self.state_dict().items():
            if name.rpartition(".")[2] not in BLOCK_MODULATION + OUT_MODULATION:
                out[f"transformer.{name}"] = tensor
        for i, block in enumerate(self.transformer_blocks):
            stacked = torch.cat([block.get_buffer(n) for n in BLOCK_MODULATION])
            out[f"transformer.transformer_blocks.{i}.modulation"] = stacked
        out["transformer.norm_out.modulation"] = torch.cat([self.scale, self.shift])
        return out


def _register(module: nn.Module, names: tuple[str, ...], dim: int) -> None:
    """Buffers [1,dim]; with zero elements while nothing is cached, as public checkpoints have them."""
    for name in names:
        module.register_buffer(name, torch.zeros(1, dim) if dim else torch.zeros(0))


def _cache(module: nn.Module, names: tuple[str, ...], source: nn.Module | None, temb: Tensor) -> None:
    for name, value in zip(names, _modulation(module, names, source, temb), strict=True):
        setattr(module, name, value.clone())


def _modulation(
    module: nn.Module, names: tuple[str, ...], source: nn.Module | None, temb: Tensor | None
) -> tuple[Tensor, ...]:
    """The vectors [1,D]: computed from temb while the module is there, from the buffers afterwards."""
    if source is not None:
        return source(temb)
    return tuple(module.get_buffer(name) for name in names)
