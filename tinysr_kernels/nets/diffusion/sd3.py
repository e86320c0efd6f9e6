"""SD3's joint transformer with every constant folded, and one step of it between the halves of its VAE: TSD-SR.

Image and text are two streams of tokens that meet in every block's attention. The image's is TinySR's network
(tinysr_dit.py), which was cut from it; the text's blocks are folded alike. What does not depend on the image is
constant: the text's tokens and their projections in the first block. What nobody asks for is left out: the text's
queries, output projection and feed-forward in the last. Folded into the VAE: the scale of the latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinysr_kernels.nets import kl_vae, tinysr_dit
from tinysr_kernels.nets.diffusion.latent import LatentStep, OfVAE
from tinysr_kernels.nets.fold import Folder
from tinysr_kernels.nets.layers import Folded, InputConv, Layer, Linear, Rows, count, ops
from tinysr_kernels.nets.networks import SMALLEST_WINDOW, resize
from tinysr_kernels.nets.tinysr_dit import EPS, Block, Update, modulated, weight_bias
from tinysr_kernels.nets.windows import blend_windows, window_weights

WINDOW_BATCH = 4
"""Windows of a latent that run as one batch."""


class Options(Protocol):
    """What the weights leave open."""

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""

    @property
    def patch_size(self) -> int:
        """Latent pixels per token and axis."""

    @property
    def scaling_factor(self) -> float:
        """k, by which the encoder's latents are multiplied and the decoder's divided."""

    @property
    def vae_groups(self) -> tuple[int, ...]:
        """Of the VAE's GroupNorms: the first that divides the channels."""

    @property
    def overlap(self) -> int:
        """Latent pixels that neighboring windows share per axis."""


def fold(tensors: Mapping[str, Tensor], options: Options, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fold `transformer.*`, `encoder.*` and `decoder.*` of a normalized checkpoint."""
    f = Folder(tensors, dtype)
    f.folded |= tinysr_dit.fold(tensors, dtype)
    blocks = count(tensors, "transformer.transformer_blocks")
    for i in range(blocks):
        _fold_text(f, i, last=i == blocks - 1)
    weight, bias = f.dense_weight("decoder.conv_in")
    f.matrix("decoder.conv_in.weight", weight / options.scaling_factor)
    f.vector("decoder.conv_in.bias", bias)
    f.folded |= kl_vae.fold_encoder(tensors, dtype, options.scaling_factor)
    f.folded |= kl_vae.fold_decoder(tensors, OfVAE(options.vae_groups), dtype)
    return f.folded


def _fold_text(f: Folder, i: int, *, last: bool) -> None:
    """The text's half of block i."""
    source, name = f"transformer.transformer_blocks.{i}", f"transformer.blocks.{i}.text"
    parts = [weight_bias(f, f"{source}.attn.add_{which}_proj") for which in ("kv" if last else "qkv")]
    weight, bias = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    if last:
        scale, shift = f.get(f"{source}.context_modulation")
    else:
        shift, scale, gate, shift_ff, scale_ff, gate_ff = f.get(f"{source}.context_modulation")
    if i == 0:
        tokens = f.get("transformer.context")
        normed = F.layer_norm(tokens, tokens.shape[1:], eps=EPS)
        f.matrix("transformer.text.projected", ((normed * (1 + scale) + shift) @ weight.T + bias)[None])
        if not last:
            f.matrix("transformer.text.tokens", tokens[None])
    else:
        modulated(f, f"{name}.{'kv' if last else 'qkv'}", weight, bias, scale, shift)
    if not last:
        f.gated_linear(f"{name}.out", *weight_bias(f, f"{source}.attn.to_add_out"), gate)
        modulated(f, f"{name}.ff1", *weight_bias(f, f"{source}.ff_context.net.0.proj"), scale_ff, shift_ff)
        f.gated_linear(f"{name}.ff2", *weight_bias(f, f"{source}.ff_context.net.2"), gate_ff)


class JointBlock(Block):
    """One block of both streams, tokens [N,T,D] and [N,P,D]; the text's parts are there where they are needed."""

    project: Linear | None
    text: Update | None

    def __init__(self, folded: Folded, prefix: str, head_dim: int) -> None:
        super().__init__(folded, prefix, head_dim)
        name = f"{prefix}.text.{'kv' if f'{prefix}.text.kv.weight' in folded else 'qkv'}"
        self.project = Linear(folded, name, norm_eps=EPS) if f"{name}.weight" in folded else None
        self.text = Update(folded, f"{prefix}.text") if f"{prefix}.text.out.weight" in folded else None

    def joint(self, rows: Rows, text: Rows | None, projected: Tensor) -> tuple[Rows, Rows | None]:
        """Both streams after the block. projected: the text's q, k and v where the block does not make them itself."""
        x, moments = rows
        if self.project is not None and text is not None:
            projected = self.project(text[0], row_moments=text[1])
        mixed = ops.joint_attention(self.qkv(x, row_moments=moments), projected, self.heads, self.scale)
        samples, tokens, width = x.shape
        rows = self.updated(x, mixed[: samples * tokens].view(samples, tokens, width))
        if self.text is None or text is None:
            return rows, None
        return rows, self.text.updated(text[0], mixed[samples * tokens :].view(text[0].shape))


class JointTransformer(tinysr_dit.Transformer):
    """z [N,16,S,S] -> z - transformer(z) in z's dtype, for one text; S the side of its window (64 in the release)."""

    block = JointBlock

    def __init__(self, folded: Folded, head_dim: int, patch_size: int) -> None:
        super().__init__(folded, head_dim, patch_size)
        self.text = Layer(folded, "transformer.text", ("projected",), ("tokens",))

    def _through_blocks(self, rows: Rows) -> Rows:
        projected, tokens = self.text.get_buffer("projected"), self.text.tokens
        text: Rows | None = None
        if isinstance(tokens, Tensor):
            text = tokens.expand(rows[0].shape[0], -1, -1), None
        for block in self.blocks:
            assert isinstance(block, JointBlock)
            rows, text = block.joint(rows, text, projected)
        return rows


class Decoder(nn.Module):
    """k times the latent [N,C,h,w] of any dtype -> image [N,3,8h,8w], [0,1] and overshoot."""

    def __init__(self, folded: Folded, options: Options) -> None:
        super().__init__()
        self.conv_in = InputConv(folded, "decoder.conv_in")
        self.rest = kl_vae.KLDecoder(folded, OfVAE(options.vae_groups))

    def forward(self, z: Tensor) -> Tensor:
        return self.rest(self.conv_in(z))


class OneStepSD3(LatentStep):
    """[N,3,H,W] in [0,1] or uint8 -> [N,3,s*H,s*W] for any whole s, over folded tensors.

    The transformer takes a latent in windows of its one size, which overlap and are blended. Latents are float32 or
    wider.
    """

    def __init__(self, folded: Folded, options: Options, upscale: int = 4) -> None:
        """ValueError for windows so small that an ordinary image would take thousands of them."""
        transformer = JointTransformer(folded, options.head_dim, options.patch_size)
        super().__init__(folded, OfVAE(options.vae_groups), transformer.window, upscale)
        self.transformer = transformer
        self.decoder = Decoder(folded, options)
        if self.transformer.window * self.encoder.factor < SMALLEST_WINDOW:
            raise ValueError(f"windows of {self.transformer.window} latent pixels a side are too small")
        self.overlap = min(options.overlap, self.transformer.window // 2)

    def forward(self, image: Tensor) -> Tensor:
        dtype = self.encoder.conv_in.weight.dtype
        z = self.encoder(resize(image, self.upscale, dtype, clamp=True))
        return self.decoder(self._restored(z))

    def _restored(self, z: Tensor) -> Tensor:
        """z - transformer(z), at once where the latent is one window."""
        side = self.transformer.window
        if z.shape[2:] == (side, side):
            found: Tensor = self.transformer(z)
            return found
        weights = window_weights(side, z.device)
        return blend_windows(z, (side, side), self.overlap, weights, 1, WINDOW_BATCH, self.transformer).to(z.dtype)
