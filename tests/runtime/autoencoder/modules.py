"""Small autoencoders of diffusers in every layout of the public ones, with weights that put every term in play."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

LAYOUTS: dict[str, dict[str, Any]] = {
    "sd": {},
    "sd3": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.06},
    "no attention": {"mid_block_add_attention": False, "layers_per_block": 1, "norm_num_groups": 4},
    "widths": {"block_out_channels": (12, 24, 20), "norm_num_groups": 2, "layers_per_block": 3},
    "one level, gray": {"block_out_channels": (8,), "norm_num_groups": 1, "in_channels": 1, "out_channels": 1},
    "quant alone": {"use_post_quant_conv": False, "in_channels": 4, "out_channels": 4, "act_fn": "swish"},
    "tiny": {},
    "tiny, 16 channels": {"latent_channels": 16, "num_encoder_blocks": (1, 2), "num_decoder_blocks": (2, 1)},
}
"""Arguments of AutoencoderKL, or of AutoencoderTiny, besides those of `autoencoder`."""


def autoencoder(name: str = "sd", seed: int = 0, **more: Any) -> Any:
    """The module of a layout in float32, for inference. more: further arguments of its class."""
    options = LAYOUTS[name] | more
    if name.startswith("tiny"):
        stages = len(options.get("num_encoder_blocks", (1, 3, 3, 3)))
        widths = {f"{half}_block_out_channels": (12,) * stages for half in ("encoder", "decoder")}
        module = diffusers.AutoencoderTiny(**(widths | options))
    else:
        options = {"block_out_channels": (16, 32), "layers_per_block": 2, "norm_num_groups": 8} | options
        levels = len(options["block_out_channels"])
        kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        module = diffusers.AutoencoderKL(**options, **{name: kind * levels for name, kind in kinds.items()})
    randomise(module, seed)
    return module.eval().requires_grad_(False)


def randomise(module: nn.Module, seed: int) -> None:
    """Weights whose outputs stay of order one, norm weights around one, every bias in play."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        gain = 0.2 if p.dim() == 1 else p[0].numel() ** -0.5
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        p.data = torch.randn(p.shape, generator=generator) * gain + center


def image_for(module: Any, height: int = 16, width: int = 24, count: int = 2) -> Tensor:
    """Images [N,C,H,W] in [-1,1]."""
    size = (count, module.config.in_channels, height, width)
    return torch.rand(size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def latent_for(module: Any, height: int = 3, width: int = 5, count: int = 2) -> Tensor:
    """Latents [N,L,h,w]."""
    size = (count, module.config.latent_channels, height, width)
    return torch.randn(size, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def both(module: Any, image: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
    """What encode and decode give: the parameters of the latents' distribution, or the latents; the images."""
    encoded = module.encode(image)
    parameters = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
    return parameters, module.decode(latent).sample


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of what was expected."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def is_fused(half: Any) -> bool:
    """Whether the half's last call, or one before it, was computed by a fused network."""
    forward = half.__dict__.get("forward")
    return forward is not None and forward._made is not None


@contextlib.contextmanager
def plain_only(caplog: pytest.LogCaptureFixture, reason: str) -> Iterator[None]:
    """The block makes no fused network, and one notice holds the reason."""
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tinysr_kernels"):
        yield
    said = [record.getMessage() for record in caplog.records if "the plain module computes" in record.getMessage()]
    assert len(said) == 1, said
    assert reason in said[0]
