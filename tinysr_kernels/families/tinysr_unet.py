"""This project's own layout, `tinysr-unet`: a pruned UNet with its decoder in one safetensors file.

Keys are AdcSR's without prefixes: `unet.*`, `decoder.*`, and `encoder.layers.*` where a tiny VAE makes the input. The
configuration lies in the metadata. A resnet with a time projection has either `<resnet>.time_bias` [C] or
`<resnet>.time_emb_proj.{weight,bias}` and `temb` [1,E]; biases and temb may lie in embeddings.safetensors beside.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tinysr_kernels.checkpoint.detect import Part
from tinysr_kernels.checkpoint.plain import is_a, kind_of
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.checkpoint.structure import LEVELS, check_kl_decoder, check_scale, check_unet
from tinysr_kernels.checkpoint.vae import check_decoder, check_encoder
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families.base import Checkpoint, ColorFix, Family, Found
from tinysr_kernels.families.config import Blocks, Epsilon, Within, checked_config
from tinysr_kernels.nets import unet_sr
from tinysr_kernels.nets.unet_sr import UPSCALE

TIME_BIAS = ".time_bias"
TIME_PROJECTION = ".time_emb_proj"
TEMB = "temb"
GROUP_NORM = re.compile(r"(resnets\.[0-9]+\.norm[12]|attentions\.[0-9]+\.(norm|group_norm)|\.conv_norm_out)\.weight$")

GROUP_CANDIDATES = (32, 24, 16, 12, 8, 6, 4, 2, 1)
UNET = Part("unet", "a tinysr-unet file (keys unet.*, decoder.*)", re.compile(r"^unet\.(conv_in|down_blocks)\."))


@dataclass(frozen=True)
class UNetConfig:
    """What the weights of a pruned UNet and its KL or tiny decoder leave open. The defaults are AdcSR's."""

    input: Literal["unshuffle", "vae"] = "unshuffle"
    unshuffle: Annotated[int, Within(1, 1 << LEVELS)] = 2
    head_dim: int = 48
    groups: tuple[int, ...] = GROUP_CANDIDATES
    """GroupNorm takes the first of these that divides its channel count."""
    unet_eps: Epsilon = 1e-5
    transformer_norm_eps: Epsilon = 1e-6
    layer_norm_eps: Epsilon = 1e-5
    decoder_eps: Epsilon = 1e-6
    prediction: Literal["direct", "subtract"] = "direct"
    """What the decoder receives with VAE input: the UNet's output, or the latent minus it."""
    residual: Literal["none", "bicubic"] = "none"
    """Whether the bicubic enlargement of the input is added to the decoder's output."""
    color_fix: ColorFix = "adain"
    scaling_factor: float = 1.0
    encoder_blocks: Blocks = (1, 3, 3, 3)
    decoder_blocks: Blocks = (3, 3, 3, 1)


class TinySRUNet(Family[UNetConfig]):
    """Recognized by its metadata, which hold its configuration too."""

    name = "tinysr-unet"
    summary = "a tinysr-unet file"
    parts = (UNET,)
    config_class = UNetConfig
    takes_embeddings = True
    embedding_names = re.compile(rf"^{TEMB}$|{re.escape(TIME_BIAS)}$")
    own_format = True

    def read(self, found: Found) -> Checkpoint:
        """Check the structure and evaluate the time projections; embeddings take precedence over the file's own."""
        part = found.parts[UNET.role]
        if not is_a(part.own, UNetConfig):  # of a module, for a file has been asked for its metadata
            raise CheckpointError(f"{part.file.where}: config: expected a UNetConfig, found {kind_of(part.own)}")
        config = checked_config(UNetConfig, part.own, f"{part.file.where}: config")
        tensors = _checked(part.file, config, _combined(found.named or found.beside))
        return Checkpoint(self.name, config, tensors, notices=found.notices, source=found.source)

    def fold(self, config: UNetConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """As every pruned UNet."""
        return unet_sr.fold(tensors, config, dtype)

    def build(self, config: UNetConfig, folded: Mapping[str, Tensor]) -> unet_sr.UNetSR:
        """The low-resolution image whole, or in blended tiles."""
        return unet_sr.UNetSR(folded, config)

    def folds(self, folded: Mapping[str, Tensor]) -> list[str]:
        """Also the range map, where the image itself is the input."""
        return unet_sr.folds(folded)


def _is_embedding_name(name: str) -> bool:
    """Whether a stored name is one that embeddings.safetensors may hold."""
    return name == TEMB or name.endswith(TIME_BIAS)


def _combined(files: Sequence[TensorFile]) -> TensorFile | None:
    """Time biases and temb of several files as one; a lone tensor of another name is temb. None for no files."""
    if not files:
        return None
    merged = TensorFile(files[0].path, {})
    for file in files:
        for name, tensor in file.only_tensors().items():
            lone = len(file.tensors) == 1 and not _is_embedding_name(name)
            name = "temb" if lone else name
            if name in merged.tensors:
                raise CheckpointError(f"{file.where}: {quoted(name)}: also in {merged.where}")
            merged.tensors[name] = tensor
    return merged


def _checked(file: TensorFile, config: UNetConfig, embeddings: TensorFile | None) -> dict[str, Tensor]:
    tensors = dict(file.only_tensors())
    origins = {}
    for name, tensor in (embeddings.only_tensors() if embeddings else {}).items():
        where = f"{embeddings.where if embeddings else ''}: {quoted(name)}"
        if not _is_embedding_name(name):
            raise CheckpointError(f"{where}: expected {TEMB!r} or '<resnet>{TIME_BIAS}'")
        tensors[name], origins[name] = tensor, where
    _evaluate_time(tensors, file.where, origins)
    weights = Weights(tensors, lambda name: origins.get(name, f"{file.where}: {quoted(name)}"))
    _check_network(weights, config, file.where)
    return weights.finish()


def _evaluate_time(tensors: dict[str, Tensor], where: str, origins: Mapping[str, str]) -> None:
    """Replace time projections by their biases, proj(SiLU(temb)) in float64; temb itself goes.

    A bias that is stored already wins over its projection.
    """
    suffix = f"{TIME_PROJECTION}.weight"
    resnets = [name[: -len(suffix)] for name in tensors if name.endswith(suffix)]
    missing = [resnet for resnet in resnets if resnet + TIME_BIAS not in tensors]
    if missing and TEMB not in tensors:
        raise CheckpointError(
            f"{where}: {quoted(missing[0] + TIME_PROJECTION)}: a time projection needs {TEMB!r} [1, E] or "
            f"{quoted(missing[0] + TIME_BIAS)}, here or in embeddings.safetensors beside; found neither. Pass "
            "embeddings="
        )
    temb = tensors.pop(TEMB, None)
    for resnet in resnets:
        projection = {
            part: tensors.pop(f"{resnet}{TIME_PROJECTION}.{part}")
            for part in ("weight", "bias")
            if f"{resnet}{TIME_PROJECTION}.{part}" in tensors
        }
        if resnet not in missing or temb is None:
            continue
        cell = Weights(
            {**projection, TEMB: temb},
            lambda part, at=resnet: (  # type: ignore[misc]
                origins.get(TEMB, f"{where}: {TEMB!r}")
                if part == TEMB
                else f"{where}: {quoted(f'{at}{TIME_PROJECTION}.{part}')}"
            ),
        )
        width = cell.take("weight", [None, None]).shape
        bias = cell.take("bias", [width[0]])
        vector = cell.take(TEMB, [1, width[1]])
        value = F.linear(F.silu(vector.double()), projection["weight"].double(), bias.double())[0]
        wide = torch.float64 in (vector.dtype, bias.dtype, projection["weight"].dtype)
        tensors[resnet + TIME_BIAS] = value if wide else value.float()


def _check_network(weights: Weights, config: UNetConfig, where: str) -> None:
    """Take the whole network and check that its parts fit and that it enlarges by four."""
    if config.input == "vae":
        latent = check_encoder(weights, "encoder.layers", config.encoder_blocks, None, None)
        shrink = 2 ** (len(config.encoder_blocks) - 1)
        outputs = check_unet(weights, config.head_dim, latent)
        if config.prediction == "subtract" and outputs != latent:
            raise CheckpointError(
                f"{weights.where('unet.conv_out')}: prediction 'subtract' needs as many channels as the latent's "
                f"{latent}, found {outputs}"
            )
        upscale = 1  # the encoder sees the image already enlarged
    else:
        if config.prediction == "subtract":
            raise CheckpointError(
                f"{where}: metadata config: prediction 'subtract' needs input 'vae', found 'unshuffle'"
            )
        shrink, upscale = config.unshuffle, UPSCALE
        outputs = check_unet(weights, config.head_dim, 3 * shrink**2)
    if weights.has_under("decoder.layers"):
        check_decoder(weights, "decoder.layers", config.decoder_blocks, None, outputs)
        upsamplers = len(config.decoder_blocks) - 1
    else:
        upsamplers = check_kl_decoder(weights, outputs)
    check_scale(where, shrink, upsamplers, upscale)
    _check_groups(weights, config)


def _check_groups(weights: Weights, config: UNetConfig) -> None:
    """Every GroupNorm's channels have a divisor among the configured group counts."""
    for name, tensor in weights.taken.items():
        if GROUP_NORM.search(name) and not any(tensor.shape[0] % groups == 0 for groups in config.groups):
            raise CheckpointError(
                f"{weights.where(name)}: expected channels that one of the configured groups {config.groups} divides, "
                f"found {tensor.shape[0]}"
            )
