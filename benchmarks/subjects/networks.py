"""The three families at their public sizes, compiled on meta tensors: shapes without weights, memory or time.

TinySR: 12 blocks of width 1536, a VAE of 64 channels whose decoder is separable as in the paper or dense as the
release also has it, and that of the paper with its transformer in fp8. AdcSR: SD 2.1's UNet at 0.75 of its widths.
tinysr-unet: the checkpoint in the package, one of AdcSR's widths with separable convolutions, and two small ones of
widths that are awkward for kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.reference.tiny_vae import TinyVAE
from model.reference.tinysr_dit import TinySRTransformer
from model.reference.unet_shapes import Shape, decoder_shapes, unet_shapes
from tinysr_kernels.checkpoint import Checkpoint, load
from tinysr_kernels.families import ColorFix, Config, Family, TinySRConfig, UNetConfig
from tinysr_kernels.nets import fold
from tinysr_kernels.ops.trace import ReadingOnes
from tinysr_kernels.runtime.compiled import CompiledSR

META = torch.device("meta")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OWN_DTYPE = {"tinysr-dit": "float16", "adcsr": "bfloat16", "tinysr-unet": "float16"}
"""The dtype that `compile` chooses on a GPU."""
VARIANTS = {
    "tinysr-dit": ("separable", "dense", "fp8"),
    "adcsr": ("released",),
    "tinysr-unet": ("demo", "large", "awkward", "awkward vae"),
}
"""Per family the networks it comes in, the one that counts first. TinySR's are named after their decoder; "fp8" is the
separable one with the transformer in e4m3."""

ADCSR_WIDTHS = (240, 480, 960, 960)
ADCSR_DECODER = (64, 128, 256, 256)
Named = tuple[Config, dict[str, Tensor]]


def network(
    family: Family, variant: str | None = None, dtype: torch.dtype | None = None, color_fix: ColorFix | None = None
) -> CompiledSR:
    """The compiled model on meta tensors.

    variant: one of VARIANTS[family], by default the first; dtype and color_fix: by default the family's own.
    ValueError for an unknown variant.
    """
    config, tensors = named_tensors(family, variant or VARIANTS[family][0])
    dtype = dtype or DTYPES[OWN_DTYPE[family]]
    with ReadingOnes():
        folded = fold(family, config, tensors, dtype, "fp8" if variant == "fp8" else None)
    return CompiledSR(
        Checkpoint(family, config, tensors, source="shapes alone"),
        folded,
        device=META,
        dtype=dtype,
        backend="reference",  # plans nothing by itself
        color_fix=color_fix or config.color_fix,
        upscale=4,
        tile=1 << 20,  # the image whole: how much fits depends on a memory that is not there
    )


def named_tensors(family: Family, variant: str, reduced: bool = False) -> Named:
    """The configuration and the normalised checkpoint on meta tensors. ValueError for an unknown variant.

    reduced: the same structure at a size that a CPU runs in a moment; TinySR's images are 32x32 then at least.
    """
    if variant not in VARIANTS[family]:
        raise ValueError(f"{family} comes as {VARIANTS[family]}, found {variant!r}")
    if reduced and variant == "released":
        return _pixels(UNetConfig(), (48, 48, 96, 96), (16, 16, 32, 32), 2, separable=False)
    return _tinysr(variant, reduced) if family == "tinysr-dit" else _unet(variant)


def _tinysr(decoder: str, reduced: bool) -> Named:
    with META:
        transformer = (
            TinySRTransformer(cached=True, dim=256, layers=2, table=8) if reduced else TinySRTransformer(cached=True)
        )
        width = 16 if reduced else 64
        vae = TinyVAE.regular(width=width, separable_encoder=True, separable_decoder=decoder != "dense")
        return TinySRConfig(), transformer.normalised_state() | vae.state_dict()


def _unet(variant: str) -> Named:
    if variant == "demo":
        checkpoint = load("demo")
        return checkpoint.config, {name: t.to(META) for name, t in checkpoint.tensors.items()}
    if variant == "awkward":
        return _pixels(UNetConfig(head_dim=30), (90, 210), (45, 63, 10, 90), 1, separable=False)
    if variant == "awkward vae":
        return _latents(UNetConfig(input="vae", prediction="subtract", head_dim=15, decoder_blocks=(1, 1, 1, 1)))
    config = UNetConfig(residual="bicubic") if variant == "large" else UNetConfig()
    return _pixels(config, ADCSR_WIDTHS, ADCSR_DECODER, 2, separable=variant == "large")


def _pixels(config: UNetConfig, widths: Sequence[int], decoder: Sequence[int], layers: int, separable: bool) -> Named:
    """A UNet on the image itself, transformers on all levels but the last, and a KL decoder."""
    attend = [True] * (len(widths) - 1) + [False]
    inputs = 3 * config.unshuffle**2
    unet = unet_shapes(inputs, decoder[-1], widths, layers, separable=separable, transformers=attend)
    return config, _empty("unet", unet) | _empty("decoder", decoder_shapes(decoder, layers + 1, separable=separable))


def _latents(config: UNetConfig) -> Named:
    """A UNet between the halves of a tiny VAE of 30 channels, its latents of 10."""
    with META:
        vae = TinyVAE.regular(width=30, latent_channels=10, config=config, separable_encoder=True)
        tensors = vae.state_dict()
    return config, tensors | _empty("unet", unet_shapes(10, 10, (45, 60), 1, separable=True, transformers=(True, True)))


def _empty(prefix: str, shapes: dict[str, Shape]) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": torch.empty(shape, device=META) for name, shape in shapes.items()}
