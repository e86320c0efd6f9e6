"""Training the two halves of the compressed VAE against the teacher's (arXiv 2508.17434, section 3.2).

The encoder learns the teacher's latents by mean squared error. The decoder learns images from the teacher's latents
by perceptual and adversarial loss, weights 3 and 1. The two are independent and may run at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.compress.training.device import Device
from model.compress.training.losses import (
    Discriminator,
    discriminator_hinge_loss,
    generator_hinge_loss,
    latent_distance,
    perceptual,
)
from model.compress.training.settings import StageSettings
from model.compress.training.stage import Losses, Stage, Turn

Batch = Callable[[int, int], Tensor]
"""(number of the batch, count) -> images [count,3,H,W] in [-1,1], the same for the same number."""
Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DecoderWeights:
    """Weights of the decoder's losses; the adversarial loss starts at step `discriminator_start_step`."""

    perceptual: float = 3.0
    adversarial: float = 1.0
    discriminator_start_step: int = 0


def train_encoder(
    encoder: nn.Module,
    teacher: Encode,
    batch: Batch,
    settings: StageSettings,
    folder: Path,
    *,
    name: str = "encoder",
    device: Device | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Train the encoder in place to give the latents that `teacher` gives."""
    stage = Stage(name, folder, settings, {"encoder": encoder}, device=device)

    def objective(turn: Turn) -> Losses:
        x = batch(turn.batch, turn.count).to(stage.device.device)
        with torch.no_grad():
            wanted = teacher(x)
        loss = latent_distance(encoder(x), wanted)
        return Losses(loss, {"relative": loss / wanted.float().var()})

    stage.run(objective, report=report)


def train_decoder(
    decoder: nn.Module,
    teacher: Encode,
    batch: Batch,
    settings: StageSettings,
    folder: Path,
    *,
    weights: DecoderWeights | None = None,
    discriminator_width: int = 64,
    name: str = "decoder",
    device: Device | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Train the decoder in place to give the images whose latents (by the teacher's encoder) it is shown."""
    weights = weights or DecoderWeights()
    torch.manual_seed(settings.seed)
    discriminator = Discriminator(discriminator_width)
    device = device or Device(settings.precision, "cpu")
    discriminator.to(device.device)
    kind, distance = perceptual(device.device)
    about = {"weights": [weights.perceptual, weights.adversarial, weights.discriminator_start_step], "perceptual": kind}
    stage = Stage(name, folder, settings, {"decoder": decoder}, discriminator=discriminator, device=device, about=about)
    report(f"{name}: perceptual loss is {kind}")

    def objective(turn: Turn) -> Losses:
        x = batch(turn.batch, turn.count).to(device.device)
        with torch.no_grad():
            z = teacher(x)
        found = decoder(z)
        seen = distance(found, x)
        loss = weights.perceptual * seen
        metrics = {"perceptual": seen, "l1": (found.float() - x).abs().mean()}
        return add_adversarial(
            loss,
            metrics,
            discriminator,
            found,
            x,
            weights.adversarial if turn.step >= weights.discriminator_start_step else 0.0,
        )

    stage.run(objective, report=report)


def add_adversarial(
    loss: Tensor, metrics: dict[str, Tensor], discriminator: nn.Module, fake: Tensor, real: Tensor, weight: float
) -> Losses:
    """Add the adversarial term, if its weight is not zero, and the discriminator's own loss."""
    if not weight:
        return Losses(loss, metrics)
    discriminator.requires_grad_(False)
    fooled = generator_hinge_loss(discriminator, fake)
    discriminator.requires_grad_(True)
    return Losses(
        loss + weight * fooled,
        metrics | {"adversarial": fooled},
        lambda: discriminator_hinge_loss(discriminator, real, fake),
    )
