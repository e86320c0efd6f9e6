"""A small AdcSR in the two pickles of its release (github.com/Guaishou74851/AdcSR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.reference.kl_decoder import KLDecoder
from model.reference.pipelines import adcsr
from model.reference.pruned_unet import PrunedUNet
from model.reference.unet_shapes import decoder_shapes, unet_shapes
from tests.layouts.weights import fill, fill_kl, rounded, write_pickle
from tinysr_kernels.families import UNetConfig

NET = "weight/net_params_200.pkl"
HALF_DECODER = "weight/pretrained/halfDecoder.ckpt"
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@dataclass
class AdcSRLayout:
    """What was written, and the networks that a loader must arrive at."""

    folder: Path
    unet: PrunedUNet
    decoder: KLDecoder
    config: UNetConfig

    def tensors(self) -> dict[str, Tensor]:
        """The normalized checkpoint: `unet.*`, `decoder.*`."""
        return _prefixed("unet", self.unet.state_dict()) | _prefixed("decoder", self.decoder.state_dict())

    def upscale(self, image: Tensor) -> Tensor:
        """The reference result, [N,3,4H,4W], computed in the image's dtype (float32 or float64)."""
        unet, decoder = self.unet.to(image.dtype), self.decoder.to(image.dtype)
        result = adcsr(image, unet, decoder, self.config)
        unet.float()
        decoder.float()
        return result


def write_adcsr(
    folder: str | Path,
    *,
    channels: Sequence[int] = (48, 48, 96, 96),
    decoder_channels: Sequence[int] = (8, 12, 30, 30),
    layers: int = 2,
    old_attention_names: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdcSRLayout:
    """Write both files with small random weights stored in `dtype`, and return the networks they describe.

    channels: the UNet's widths per level, multiples of the head width 48. decoder_channels: the decoder's,
    narrowest first. old_attention_names: the decoder's attention is named query, key, value, proj_attn, as in
    old files.
    """
    folder = Path(folder)
    config = UNetConfig()
    attend = [i < len(channels) - 1 for i in range(len(channels))]
    shapes = unet_shapes(3 * config.unshuffle**2, decoder_channels[-1], channels, layers, transformers=attend)
    unet = PrunedUNet(shapes, config)
    decoder = KLDecoder(decoder_shapes(decoder_channels, layers + 1), config)
    fill(unet, seed)
    fill_kl(decoder, seed + 1)
    for network in (unet, decoder):
        rounded(network, dtype)
    state = {k: v.to(dtype) for k, v in decoder.state_dict().items()}
    if old_attention_names:
        state = {_old_name(k): v for k, v in state.items()}
    trained = {k: v for k, v in state.items() if k.startswith("mid_block.")}
    rest = {k: v for k, v in state.items() if not k.startswith("mid_block.")}
    public = {k: v.to(dtype) for k, v in unet.state_dict().items()}
    write_pickle(folder / NET, _net_params(public, trained, len(channels)))
    write_pickle(folder / HALF_DECODER, _lightning(rest, trained, decoder_channels[-1], seed))
    return AdcSRLayout(folder, unet, decoder, config)


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def _old_name(name: str) -> str:
    if "attentions" in name:
        for new, old in OLD_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name


def _net_params(unet: dict[str, Tensor], middle: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """DataParallel's state dict: number 1 is the UNet, most of it again in its `body`, 2 the middle block."""
    names = [f"down_blocks.{i}" for i in range(levels)] + ["mid_block"]
    names += [f"up_blocks.{i}" for i in range(levels)] + ["conv_norm_out", "", "conv_out"]
    state = _prefixed("module.body.1", unet)
    for number, name in enumerate(names):
        again = {k.removeprefix(name): v for k, v in unet.items() if name and k.startswith(f"{name}.")}
        state |= {f"module.body.1.body.{number}{rest}": tensor for rest, tensor in again.items()}
    return state | {f"module.body.2.{k.removeprefix('mid_block.')}": v for k, v in middle.items()}


def _lightning(rest: dict[str, Tensor], middle: dict[str, Tensor], width: int, seed: int) -> dict[str, object]:
    """A training checkpoint: the decoder before its middle block was trained on, beside foreign keys."""
    generator = torch.Generator().manual_seed(seed + 7)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    unused = {k: noise(*v.shape).to(v) for k, v in middle.items()}
    unused |= {"conv_in.weight": noise(width, 4, 3, 3), "conv_in.bias": noise(width)}
    foreign = {
        "encoder.conv_in.weight": noise(8, 3, 3, 3),
        "loss.discriminator.main.0.weight": noise(8, 3, 4, 4),
        "loss.logvar": torch.zeros(()),
        "quant_conv.weight": noise(8, 8, 1, 1),
    }
    return {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "1.9.0",
        "state_dict": _prefixed("decoder", unused | rest) | foreign,
        "optimizer_states": [{"state": {0: {"step": torch.tensor(10.0)}}, "param_groups": [{"lr": 1e-4}]}],
        "lr_schedulers": [],
    }
