"""AdcSR (arXiv 2411.13383), as released: two pickles, normalized to the names of the `tinysr-unet` layout.

`net_params` holds the UNet as `body.1.*` (and once more as `body.1.body.*`, ignored) and the trained middle of the
decoder as `body.2.*`; the rest of the decoder comes from `halfDecoder`, whose own conv_in and mid_block are unused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.detect import Folder, Part
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.sd.kl_vae import KL_VAE, modern
from tinysr_kernels.checkpoint.structure import check_kl_decoder, check_scale, check_unet
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Checkpoint, Family, Found
from tinysr_kernels.families.tinysr_unet import UNetConfig
from tinysr_kernels.nets import unet_sr

NET = Part(
    "adcsr",
    "AdcSR's net_params (keys body.1.*, body.2.*)",
    re.compile(r"^(module\.)?body\.[0-9]+\."),
    names=("net_params", "unet"),
)
DECODER = Part(
    "decoder",
    "AdcSR's halfDecoder (keys decoder.up_blocks.*)",
    re.compile(r"^(module\.)?(decoder\.)?up_blocks\.[0-9]+\.resnets\."),
)
MIDDLE = "body.2.resnets.1.conv2.bias"
"""As wide as the decoder that it was trained with."""
DECODER_PARTS = ("up_blocks.", "conv_norm_out.", "conv_out.")


class AdcSR(Family[UNetConfig]):
    """Recognized by net_params; the configuration is fixed: `UNetConfig`'s defaults are AdcSR's."""

    name = "adcsr"
    summary = "AdcSR's net_params and halfDecoder"
    parts = (NET, DECODER)
    config_class = UNetConfig
    dtype = "bfloat16"

    def select(self, folder: Folder, main: TensorFile) -> None:
        """Of several decoders (a full VAE may lie about) those as wide as the middle that was trained."""
        if not folder.of(DECODER.role):
            folder.files[DECODER.role] = folder.of(KL_VAE.role)  # with its encoder it is taken for a whole VAE
        middle = next((t for name, t in main.tensors.items() if name.removeprefix("module.") == MIDDLE), None)
        first = re.compile(r"(^|\.)up_blocks\.0\.resnets\.0\.norm1\.weight$")
        fitting = [
            file
            for file in folder.of(DECODER.role)
            if middle is not None and any(first.search(n) and t.shape == middle.shape for n, t in file.tensors.items())
        ]
        if len(folder.of(DECODER.role)) > 1 and fitting:
            folder.files[DECODER.role] = fitting

    def read(self, found: Found) -> Checkpoint:
        """The UNet and the decoder's middle from net_params, the rest of the decoder from halfDecoder."""
        config = UNetConfig()
        tensors = _normalized(found.parts[NET.role].file, found.parts[DECODER.role].file, config)
        return Checkpoint(self.name, config, tensors, notices=found.notices, source=found.source)

    def fold(self, config: UNetConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """As every pruned UNet."""
        return unet_sr.fold(tensors, config, dtype)

    def build(self, config: UNetConfig, folded: Mapping[str, Tensor]) -> unet_sr.UNetSR:
        """The low-resolution image whole, or in blended tiles."""
        return unet_sr.UNetSR(folded, config)

    def folds(self, folded: Mapping[str, Tensor]) -> list[str]:
        """Also the range map."""
        return unet_sr.folds(folded)


def _normalized(net: TensorFile, decoder: TensorFile, config: UNetConfig) -> dict[str, Tensor]:
    """Check and rename both files; CheckpointError naming file and stored key for whatever does not fit."""
    origins: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for file, renamed in ((net, _net_names(net, decoder is net)), (decoder, _decoder_names(decoder, net))):
        for stored, name in renamed.items():
            name = modern(name)
            if name in tensors:
                raise CheckpointError(f"{file.where}: {quoted(stored)}: the same tensor as {origins[name]}")
            tensors[name], origins[name] = file.tensors[stored], f"{file.where}: {quoted(stored)}"

    def origin(name: str) -> str:
        if name in origins:
            return origins[name]
        if name.startswith("unet."):
            return f"{net.where}: {quoted(name.replace('unet.', 'body.1.', 1))}"
        if name.startswith("decoder.mid_block"):
            return f"{net.where}: {quoted(name.replace('decoder.mid_block', 'body.2', 1))}"
        return f"{decoder.where}: {quoted(name)}"

    weights = Weights(tensors, origin)
    outputs = check_unet(weights, config.head_dim, 3 * config.unshuffle**2)
    _check_transformers(weights)
    upsamplers = check_kl_decoder(weights, outputs, attention=True)
    check_scale(decoder.where, config.unshuffle, upsamplers)
    return weights.finish()


def _net_names(net: TensorFile, whole: bool) -> dict[str, str]:
    """Stored name -> normalized name for the UNet and the decoder's middle; a bare UNet's state dict serves as well.

    `whole`: the file holds the decoder too, under `decoder.`, for `_decoder_names` to read.
    """
    stored = net.only_tensors()
    plain = {name: name.removeprefix("module.") for name in stored}
    if not any(name.startswith("body.") for name in plain.values()):
        if "conv_in.weight" not in plain.values():
            raise CheckpointError(
                f"{net.where}: expected AdcSR's keys body.1.* and body.2.*, found {listed(stored, 3)}"
            )
        return {name: f"unet.{bare}" for name, bare in plain.items()}
    renamed = {}
    for name, bare in plain.items():
        if bare.startswith("body.1.body."):
            continue
        if bare.startswith("body.1."):
            renamed[name] = f"unet.{bare.removeprefix('body.1.')}"
        elif bare.startswith("body.2."):
            renamed[name] = f"decoder.mid_block.{bare.removeprefix('body.2.')}"
        elif not (whole and bare.startswith("decoder.")):
            raise CheckpointError(f"{net.where}: {quoted(name)}: unexpected, AdcSR has body.1.* and body.2.*")
    return renamed


def _decoder_names(decoder: TensorFile, net: TensorFile) -> dict[str, str]:
    """Stored name -> normalized name for what the decoder file contributes; its foreign keys are ignored."""
    plain = {name: name.removeprefix("module.") for name in decoder.tensors}
    if not any(name.startswith("decoder.") for name in plain.values()):
        plain = {name: f"decoder.{bare}" for name, bare in plain.items()}
    wanted = [f"decoder.{part}" for part in DECODER_PARTS]
    if not any(name.removeprefix("module.").startswith("body.2.") for name in net.tensors):
        wanted.append("decoder.mid_block.")
    renamed = {name: bare for name, bare in plain.items() if bare.startswith(tuple(wanted))}
    if not renamed:
        raise CheckpointError(
            f"{decoder.where}: expected the decoder's keys decoder.up_blocks.*, decoder.conv_norm_out.* and "
            f"decoder.conv_out.*, found {listed(decoder.tensors, 3) or 'no tensors'}"
        )
    return renamed


def _check_transformers(weights: Weights) -> None:
    """A block of AdcSR has a transformer after each resnet or after none; its middle has one."""
    blocks = [f"unet.{side}_blocks.{i}" for side in ("down", "up") for i in range(weights.count(f"unet.{side}_blocks"))]
    for block in blocks:
        resnets, attentions = weights.count(f"{block}.resnets"), weights.count(f"{block}.attentions")
        if attentions not in (0, resnets):
            raise CheckpointError(
                f"{weights.where(f'{block}.attentions')}: expected none or {resnets} transformers, found {attentions}"
            )
    if not weights.has_under("unet.mid_block.attentions.0"):
        raise CheckpointError(f"{weights.where('unet.mid_block.attentions.0')}: expected a transformer, found none")
