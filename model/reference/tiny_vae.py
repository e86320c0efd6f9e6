"""TinySR's VAE in plain PyTorch: AutoencoderTiny's layers, any convolution dense or separable.

Built from a mapping `name -> shape` in the public names (`encoder.layers.K...`, `decoder.layers.K...`): a
convolution with `weight` is dense, one with `depthwise.weight` and `pointwise.weight` is separable, and a
bias is there if its key is. Layer numbers follow from the counts of residual blocks per stage, which the
shapes alone do not say.

Checked against diffusers (models/autoencoders/vae.py, EncoderTiny and DecoderTiny) and against the separable
form of the public code (github.com/Microtreei/TinySR, models/vae/tinyvae.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from model.reference.pruned_unet import Shapes, convolution, under
from tinysr_kernels.families import TinySRConfig, UNetConfig

LATENT_LIMIT = 3.0
BLOCK_CONVS = (0, 2, 4)
Step = tuple[str, int]
"""(kind, layer number): conv, down (stride 2), block, relu or up (nearest x2)."""


def encoder_steps(blocks: Sequence[int]) -> Iterator[Step]:
    """The encoder's layers: a convolution, from the second stage on strided, before each stage's blocks."""
    number = 0
    for stage, repeats in enumerate(blocks):
        for kind in ("down" if stage else "conv", *["block"] * repeats):
            yield kind, number
            number += 1
    yield "conv", number


def decoder_steps(blocks: Sequence[int]) -> Iterator[Step]:
    """The decoder's layers: per stage its blocks, an enlargement (but for the last) and a convolution."""
    yield "conv", 0
    yield "relu", 1
    number = 2
    for stage, repeats in enumerate(blocks):
        enlarge = ["up"] if stage < len(blocks) - 1 else []
        for kind in (*["block"] * repeats, *enlarge, "conv"):
            yield kind, number
            number += 1


class Block(nn.Module):
    """relu(conv.4(relu(conv.2(relu(conv.0(x))))) + x); [N,C,H,W] -> same."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        convs = [convolution(under(shapes, f"conv.{i}")) for i in BLOCK_CONVS]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _layers(shapes: Shapes, steps: Iterator[Step]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for kind, number in steps:
        own = under(shapes, f"layers.{number}")
        if kind == "block":
            layers.append(Block(own))
        elif kind == "relu":
            layers.append(nn.ReLU())
        elif kind == "up":
            layers.append(nn.Upsample(scale_factor=2.0, mode="nearest"))
        else:
            layers.append(convolution(own, stride=2 if kind == "down" else 1))
    return nn.Sequential(*layers)


class TinyEncoder(nn.Module):
    """Image [N,3,H,W] in [-1,1] -> latent [N,C,H/f,W/f], f = `factor` = 2^(stages - 1)."""

    def __init__(self, shapes: Shapes, blocks: Sequence[int] = TinySRConfig.encoder_blocks) -> None:
        super().__init__()
        self.factor = 2 ** (len(blocks) - 1)
        self.layers = _layers(shapes, encoder_steps(blocks))

    def forward(self, x: Tensor) -> Tensor:
        # The map to [0,1] comes before the zero padding of the first convolution: its border sees black, not
        # gray.
        return self.layers((x + 1) / 2)


class TinyDecoder(nn.Module):
    """Latent [N,C,h,w] -> image [N,3,h*f,w*f] around [-1,1], not clamped, f = `factor`."""

    def __init__(self, shapes: Shapes, blocks: Sequence[int] = TinySRConfig.decoder_blocks) -> None:
        super().__init__()
        self.factor = 2 ** (len(blocks) - 1)
        self.layers = _layers(shapes, decoder_steps(blocks))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(torch.tanh(z / LATENT_LIMIT) * LATENT_LIMIT) * 2 - 1


class TinyVAE(nn.Module):
    """Both halves, without the scaling factor, which belongs to the pipeline."""

    def __init__(self, encoder: TinyEncoder, decoder: TinyDecoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    @classmethod
    def regular(
        cls,
        *,
        width: int = 64,
        latent_channels: int = 16,
        config: TinySRConfig | UNetConfig | None = None,
        separable_encoder: bool = False,
        separable_decoder: bool = False,
    ) -> TinyVAE:
        """A new VAE of one width throughout; the defaults are the released one's, dense."""
        config = config or TinySRConfig()
        encoder = encoder_shapes(width, latent_channels, config.encoder_blocks, separable_encoder)
        decoder = decoder_shapes(width, latent_channels, config.decoder_blocks, separable_decoder)
        return cls(TinyEncoder(encoder, config.encoder_blocks), TinyDecoder(decoder, config.decoder_blocks))

    @classmethod
    def from_state(
        cls,
        tensors: Mapping[str, Tensor],
        config: TinySRConfig | UNetConfig | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> TinyVAE:
        """The VAE that a state dict in the public names describes, its weights loaded in `dtype`.

        Widths, biases and the form of each convolution come from the tensors, the counts of blocks from
        `config`. Raises KeyError for a missing weight, RuntimeError (naming them) for other missing or
        unexpected tensors.
        """
        config = config or TinySRConfig()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        encoder = TinyEncoder(under(shapes, "encoder"), config.encoder_blocks)
        model = cls(encoder, TinyDecoder(under(shapes, "decoder"), config.decoder_blocks)).to(dtype)
        model.load_state_dict(dict(tensors))
        return model.requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        """Image [N,3,H,W] in [-1,1] -> latent; H and W multiples of the encoder's factor (8)."""
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        """Latent -> image around [-1,1], not clamped."""
        return self.decoder(z)


def conv_shapes(outputs: int, inputs: int, *, bias: bool, separable: bool) -> dict[str, tuple[int, ...]]:
    """The tensors of one 3x3 convolution, dense or separable."""
    if separable:
        shapes: dict[str, tuple[int, ...]] = {
            "depthwise.weight": (inputs, 1, 3, 3),
            "pointwise.weight": (outputs, inputs, 1, 1),
        }
        return shapes | ({"pointwise.bias": (outputs,)} if bias else {})
    return {"weight": (outputs, inputs, 3, 3)} | ({"bias": (outputs,)} if bias else {})


def encoder_shapes(width: int, latent: int, blocks: Sequence[int], separable: bool) -> dict[str, tuple[int, ...]]:
    """The tensors `layers.K...` of a regular encoder; the convolutions of stride 2 have no bias."""
    steps = list(encoder_steps(blocks))
    return _shapes(steps, (3, width, latent), separable, {n for kind, n in steps if kind == "down"})


def decoder_shapes(width: int, latent: int, blocks: Sequence[int], separable: bool) -> dict[str, tuple[int, ...]]:
    """The tensors `layers.K...` of a regular decoder; the convolutions after an enlargement have no bias."""
    steps = list(decoder_steps(blocks))
    return _shapes(steps, (latent, width, 3), separable, {n + 1 for kind, n in steps if kind == "up"})


def _shapes(
    steps: list[Step], widths: tuple[int, int, int], separable: bool, unbiased: set[int]
) -> dict[str, tuple[int, ...]]:
    """Shapes of all convolutions; `widths` are those of the input, of the layers and of the output."""
    shapes: dict[str, tuple[int, ...]] = {}
    for kind, number in steps:
        inputs = widths[0 if number == 0 else 1]
        outputs = widths[2 if number == steps[-1][1] else 1]
        convs = [f"conv.{i}." for i in BLOCK_CONVS] if kind == "block" else [""] * (kind in ("conv", "down"))
        for conv in convs:
            tensors = conv_shapes(outputs, inputs, bias=number not in unbiased, separable=separable)
            shapes |= {f"layers.{number}.{conv}{name}": shape for name, shape in tensors.items()}
    return shapes
