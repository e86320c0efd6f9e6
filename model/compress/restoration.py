"""Restoration training of the pruned transformer in two stages (arXiv 2508.17434, section 3.3), by LoRA.

First in latent space: the L1 distance of the student's x0 from the teacher's, on pairs that were encoded beforehand.
Then on pictures: L1, perceptual and adversarial loss of the decoded result, weights 5, 1 and 0.3. Afterwards the LoRA
is merged, and only then is the modulation evaluated and stored, for the LoRA adapts the modules that make it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.compress.training.lora_layers import inject, merge
from model.compress.training.losses import Critic, perceptual
from model.compress.training.stage import Device, Losses, Stage, StageSettings, checkpointed
from model.compress.vae.train import with_critic
from model.reference.tinysr_dit import TinySRTransformer

LORA_WHERE = r"(to_[qkv]|to_out\.0|proj|proj_out|linear|linear_[12]|net\.2)$"
"""The linear layers that TinySR's release adapts, and the last one."""

LatentPairs = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, count) -> latents of enlarged pictures [count,C,S,S] and the teacher's x0 for them."""
PicturePairs = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, count) -> enlarged and original pictures [count,3,H,W] in [-1,1]."""


@dataclass(frozen=True)
class PictureWeights:
    """Weights of the second stage's losses; the critic joins in at the step `critic_from`."""

    l1: float = 5.0
    perceptual: float = 1.0
    adversarial: float = 0.3
    critic_from: int = 0


def adapt(transformer: TinySRTransformer, rank: int, seed: int = 0) -> None:
    """Freeze the transformer, but for LoRA of the given rank on its linear layers."""
    torch.manual_seed(seed)
    inject(transformer, rank, LORA_WHERE)


def distil_latents(
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

    def objective(step: int) -> Losses:
        z, wanted = (t.to(stage.device.device) for t in pairs(step, settings.batch))
        loss = F.l1_loss((z - transformer(z, temb=temb)).float(), wanted)
        return Losses(loss, {})

    with checkpointed(transformer.transformer_blocks, settings.checkpointing):
        stage.run(objective, report=report)


def train_pictures(
    transformer: TinySRTransformer,
    temb: Tensor,
    encoder: nn.Module,
    decoder: nn.Module,
    scaling: float,
    pairs: PicturePairs,
    settings: StageSettings,
    folder: Path,
    *,
    weights: PictureWeights | None = None,
    train_decoder: bool = False,
    critic_width: int = 64,
    name: str = "restore-pictures",
    device: Device | None = None,
    observe: Callable[[int], dict[str, float]] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """The second stage; pictures are as large as the transformer's window. The decoder learns along on request."""
    weights = weights or PictureWeights()
    torch.manual_seed(settings.seed)
    device = device or Device(settings.precision, "cpu")
    critic = Critic(critic_width).to(device.device)
    kind, distance = perceptual(device.device)
    about = {"weights": [weights.l1, weights.perceptual, weights.adversarial, weights.critic_from], "perceptual": kind}
    encoder.requires_grad_(False)
    decoder.requires_grad_(train_decoder)
    trained = {"transformer": transformer} | ({"decoder": decoder} if train_decoder else {})
    stage = Stage(name, folder, settings, trained, critic=critic, device=device, about=about)
    temb = temb.to(device.device)
    report(f"{name}: perceptual loss is {kind}")

    def objective(step: int) -> Losses:
        enlarged, original = (t.to(device.device) for t in pairs(step, settings.batch))
        with torch.no_grad():
            z = encoder(enlarged) * scaling
        found = decoder((z - transformer(z, temb=temb)) / scaling)
        l1, seen = F.l1_loss(found.float(), original), distance(found, original)
        loss = weights.l1 * l1 + weights.perceptual * seen
        weight = weights.adversarial if step >= weights.critic_from else 0.0
        return with_critic(loss, {"l1": l1, "perceptual": seen}, critic, found, original, weight)

    with checkpointed(transformer.transformer_blocks, settings.checkpointing):
        stage.run(objective, observe=observe, report=report)


@torch.no_grad()
def finish(transformer: TinySRTransformer, temb: Tensor) -> TinySRTransformer:
    """Merge the LoRA, evaluate and store the modulation (in float64), drop what made it; returns the transformer."""
    merge(transformer)
    dtype = transformer.proj_out.weight.dtype
    transformer.double().cache_modulation(temb=temb.double())
    return transformer.to(dtype).requires_grad_(False)
