"""Restoration training of the pruned transformer in two stages (arXiv 2508.17434, section 3.3), by LoRA.

First in latent space: L1 distance between the student's and the teacher's x0, on precomputed latent pairs. Then on
images: that distance again, beside the perceptual and the adversarial loss of the decoded result, weights 5, 1 and 0.3
(the paper reports that L1 to the original images, with the weight 5, gives blurred results). Afterwards the LoRA is
merged; then the modulation is evaluated and stored, since the LoRA also adapts the modules that compute it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.compress.training.device import Device
from model.compress.training.lora_layers import inject, merge
from model.compress.training.losses import Discriminator, perceptual
from model.compress.training.settings import StageSettings
from model.compress.training.stage import Losses, Stage, Turn, checkpointed
from model.compress.vae.train import add_adversarial
from model.reference.tinysr_dit import TinySRTransformer

LORA_WHERE = r"(to_[qkv]|to_out\.0|proj|proj_out|linear|linear_[12]|net\.2)$"
"""The linear layers that TinySR's release adapts, and the last one."""

LatentPairs = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, count) -> latents of enlarged images [count,C,S,S] and the teacher's x0 for them."""
ImagePairs = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, count) -> enlarged and original images [count,3,H,W] in [-1,1]."""


@dataclass(frozen=True)
class ImageLossWeights:
    """Weights of the second stage's losses; the adversarial loss starts at step `discriminator_start_step`."""

    latent_l1: float = 5.0
    """Of the L1 distance from the teacher's x0, in latents times the scaling factor."""
    image_l1: float = 0.0
    """Of the L1 distance from the original images."""
    perceptual: float = 1.0
    adversarial: float = 0.3
    discriminator_start_step: int = 0


def adapt(transformer: TinySRTransformer, rank: int, seed: int = 0) -> None:
    """Freeze the transformer, but for LoRA of the given rank on its linear layers."""
    torch.manual_seed(seed)
    inject(transformer, rank, LORA_WHERE)


def distill_latents(
    transformer: TinySRTransformer,
    temb: Tensor,
    pairs: LatentPairs,
    settings: StageSettings,
    folder: Path,
    *,
    name: str = "restore-latents",
    device: Device | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """The first stage, on an adapted transformer; temb [1,D] is the constant it is conditioned by."""
    stage = Stage(name, folder, settings, {"transformer": transformer}, device=device)
    temb = temb.to(stage.device.device)

    def objective(turn: Turn) -> Losses:
        z, wanted = (t.to(stage.device.device) for t in pairs(turn.batch, turn.count))
        loss = F.l1_loss((z - transformer(z, temb=temb)).float(), wanted)
        return Losses(loss, {})

    with checkpointed(transformer.transformer_blocks, settings.gradient_checkpointing):
        stage.run(objective, report=report)


def train_on_images(
    transformer: TinySRTransformer,
    temb: Tensor,
    encoder: nn.Module,
    decoder: nn.Module,
    scaling: float,
    pairs: ImagePairs,
    settings: StageSettings,
    folder: Path,
    *,
    teacher: Callable[[Tensor], Tensor] | None = None,
    weights: ImageLossWeights | None = None,
    train_decoder: bool = False,
    discriminator_width: int = 64,
    name: str = "restore-images",
    device: Device | None = None,
    observe: Callable[[int], dict[str, float]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """The second stage; images are as large as the transformer's window.

    teacher: enlarged images [N,3,H,W] -> the teacher's x0, latents times `scaling`. train_decoder: train the decoder
    too. ValueError if the latent loss has a weight and there is no teacher.
    """
    weights = weights or ImageLossWeights()
    if weights.latent_l1 and teacher is None:
        raise ValueError("image_weights.latent_l1 needs the teacher's x0")
    torch.manual_seed(settings.seed)
    device = device or Device(settings.precision, "cpu")
    discriminator = Discriminator(discriminator_width).to(device.device)
    kind, distance = perceptual(device.device)
    about = {
        "weights": asdict(weights),
        "perceptual": kind,
    }
    encoder.requires_grad_(False)
    decoder.requires_grad_(train_decoder)
    trained = {"transformer": transformer} | ({"decoder": decoder} if train_decoder else {})
    stage = Stage(name, folder, settings, trained, discriminator=discriminator, device=device, about=about)
    temb = temb.to(device.device)
    report(f"{name}: perceptual loss is {kind}")

    def objective(turn: Turn) -> Losses:
        enlarged, original = (t.to(device.device) for t in pairs(turn.batch, turn.count))
        with torch.no_grad():
            z = encoder(enlarged) * scaling
            wanted = teacher(enlarged).float() if teacher is not None and weights.latent_l1 else None
        x0 = z - transformer(z, temb=temb)
        found = decoder(x0 / scaling)
        l1, seen = F.l1_loss(found.float(), original), distance(found, original)
        metrics = {"l1": l1, "perceptual": seen}
        loss = weights.image_l1 * l1 + weights.perceptual * seen
        if wanted is not None:
            metrics["latent_l1"] = F.l1_loss(x0.float(), wanted)
            loss = loss + weights.latent_l1 * metrics["latent_l1"]
        weight = weights.adversarial if turn.step >= weights.discriminator_start_step else 0.0
        return add_adversarial(loss, metrics, discriminator, found, original, weight)

    with checkpointed(transformer.transformer_blocks, settings.gradient_checkpointing):
        stage.run(objective, observe=observe, report=report)


@torch.no_grad()
def finish(transformer: TinySRTransformer, temb: Tensor) -> TinySRTransformer:
    """Merge the LoRA, evaluate and store the modulation (in float64), drop what made it; returns the transformer."""
    merge(transformer)
    dtype = transformer.proj_out.weight.dtype
    transformer.double().cache_modulation(temb=temb.double())
    return transformer.to(dtype).requires_grad_(False)
