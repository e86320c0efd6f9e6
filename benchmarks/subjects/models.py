"""The families at full size with random weights, in both forms: the reference networks and the compiled model.

Both come from one normalized checkpoint, so that they compute the same and can be compared as well as timed. Weights
are N(0, 1/fan-in), scaled so that activations stay of order one; those of the demo are its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.subjects.families import SUBJECTS
from benchmarks.subjects.networks import OWN_DTYPE, VARIANTS, named_tensors
from tinysr_kernels.families import Checkpoint, Config, fold, load
from tinysr_kernels.launch.backend import choose_backend
from tinysr_kernels.runtime.arguments import DTYPES
from tinysr_kernels.runtime.compiled import CompiledSR

IMAGE_OUT = ("decoder.conv_out.", "decoder.layers.18.")
IMAGE_GAIN = 0.2
"""Of the last convolution, so that most of the image lies within its range."""
RELU_GAIN, RESIDUAL_GAIN = 1.4, 0.5
"""Of the tiny VAE's products: what a ReLU takes away, and what residual sums would add up to."""


@dataclass(frozen=True)
class Model:
    """A normalized checkpoint, float32, on one device."""

    family: str
    variant: str
    config: Config
    tensors: Mapping[str, Tensor]

    @property
    def own_dtype(self) -> str:
        """What `compile` chooses: on a GPU the family's own, float32 elsewhere."""
        return OWN_DTYPE[self.family] if self.device.type == "cuda" else "float32"

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return next(iter(self.tensors.values())).device

    def reference(self, dtype: torch.dtype = torch.float32) -> Reference:
        """The networks in plain PyTorch."""
        parts = SUBJECTS[self.family].parts(self.tensors, self.config)
        for part in parts.values():
            part.requires_grad_(False).eval().to(self.device, dtype)
        return Reference(self.family, self.config, dict(parts))

    def compiled(
        self, dtype: str | None = None, backend: str = "auto", graphs: int = 8, quantize: str | None = None
    ) -> CompiledSR:
        """As `tinysr_kernels.compile` makes it of this checkpoint. InputError where it has no such quantized form."""
        run_dtype = DTYPES[dtype or self.own_dtype]
        with torch.inference_mode():
            folded = fold(self.family, self.config, self.tensors, run_dtype, quantize)
        return CompiledSR(
            Checkpoint(self.family, self.config, dict(self.tensors), source="random weights"),
            folded,
            device=self.device,
            dtype=run_dtype,
            backend=choose_backend(backend, self.device),
            color_fix=self.config.color_fix,
            upscale=4,
            tile=None,
            graphs=graphs,
        )


@dataclass
class Reference:
    """The networks of one family in plain PyTorch, by name, which may be replaced: compiled, wrapped, moved."""

    family: str
    config: Config
    parts: dict[str, Any]

    def __call__(self, image: Tensor) -> Tensor:
        """[N,3,H,W] in [0,1], of the networks' dtype and device -> [N,3,4H,4W] in [0,1]."""
        return SUBJECTS[self.family].enlarge(image, self.parts, self.config)


def model(
    family: str,
    variant: str | None = None,
    device: torch.device | None = None,
    *,
    reduced: bool = False,
    seed: int = 0,
) -> Model:
    """A family at its public size (`networks.VARIANTS`) on a device, by default the CPU. The demo is loaded.

    reduced: see `networks.named_tensors`; the demo is small as it is.
    """
    variant = variant or VARIANTS[family][0]
    device = device or torch.device("cpu")
    if variant == "demo":
        checkpoint = load("demo")
        return Model(family, variant, checkpoint.config, {k: t.to(device) for k, t in checkpoint.tensors.items()})
    config, shapes = named_tensors(family, variant, reduced)
    generator = torch.Generator(device).manual_seed(seed)
    return Model(family, variant, config, {name: _random(name, t, generator) for name, t in shapes.items()})


def image(height: int, width: int, batch: int = 1, seed: int = 0, device: torch.device | None = None) -> Tensor:
    """[N,3,H,W] uint8: smooth colors under a little noise, every channel and image different."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, 5, 5, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    noise = torch.rand(batch, 3, height, width, generator=generator)
    return (255 * (0.8 * smooth + 0.2 * noise)).round().to(device or "cpu", torch.uint8)


def _random(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator, device=generator.device)
    if name.endswith("pos_embed"):
        return 0.5 * noise
    if name.endswith("modulation"):
        return 0.2 * noise
    if like.dim() > 1:
        gain = (like.numel() // like.shape[0]) ** -0.5
        if name.startswith(IMAGE_OUT):
            gain *= IMAGE_GAIN
        elif ".layers." in name and "depthwise" not in name:
            gain *= RESIDUAL_GAIN if ".conv.4." in name else RELU_GAIN
        return gain * noise
    return 1 + 0.2 * noise if name.endswith("weight") else 0.1 * noise
