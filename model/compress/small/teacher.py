"""The small teacher: SD3's architecture throughout (KL VAE, joint blocks, prompt, time), trained for one step.

x0 = z - v(z, prompt, t = 1000), as TSD-SR does it: z is the latent of the enlarged image. Prompt and pooled prompt
are constants drawn once, as in inference with an empty prompt.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.compress.small.data import Pairs, channels_last, draw, to_range
from model.compress.small.preset import Preset
from model.compress.training.losses import structure_distance
from model.compress.training.stage import Losses, Stage, Turn
from model.reference.kl_vae import KLVAE, kl_config, kl_vae_shapes
from model.reference.pipelines import bicubic
from model.reference.sd3_transformer import SD3Transformer


@dataclass
class Latents:
    """Latents, times the scaling factor, of enlarged (`lr`) and original (`hr`) images, [K,C,32,32]."""

    lr: Tensor
    hr: Tensor
    scaling: float

    def windows(self, step: int, seed: int, count: int, window: int) -> tuple[Tensor, Tensor]:
        """Random windows [count,C,window,window] of both."""
        rng = draw(seed, step)
        low, high = [], []
        for index in rng.integers(len(self.lr), size=count):
            y, x = (int(v) for v in rng.integers(0, self.lr.shape[2] - window + 1, 2))
            low.append(self.lr[index, :, y : y + window, x : x + window].float())
            high.append(self.hr[index, :, y : y + window, x : x + window].float())
        return torch.stack(low), torch.stack(high)


class Teacher:
    """The trained networks, with the interface that `tinysr` in model/reference/pipelines.py expects."""

    def __init__(self, vae: KLVAE, transformer: SD3Transformer, prompt: Tensor, pooled: Tensor, preset: Preset) -> None:
        self.vae, self.transformer, self.prompt, self.pooled = vae, transformer, prompt, pooled
        self.window = preset.window
        self.encoder = SimpleNamespace(factor=2 ** (len(preset.vae_channels) - 1))

    def __call__(self, z: Tensor) -> Tensor:
        return self.transformer(z, self.prompt, self.pooled)

    def encode(self, x: Tensor) -> Tensor:
        return self.vae.encode(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z)


def build_vae(preset: Preset) -> KLVAE:
    """The untrained VAE."""
    torch.manual_seed(preset.seed)
    shapes = kl_vae_shapes(preset.vae_channels, preset.latent, preset.vae_layers)
    vae = KLVAE(shapes, kl_config(preset.vae_groups, preset.vae_eps))
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if name.endswith("conv2") and module.bias is not None:
                # Residual branches start near zero, so that the signal passes the untrained blocks.
                with torch.no_grad():
                    module.weight.mul_(0.1)
                    module.bias.zero_()
    vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae


def train_vae(preset: Preset, pairs: Pairs, folder: Path, report: Any) -> KLVAE:
    """Stage 1: reconstruct images, originals and degraded ones alike, with a weak KL term."""
    vae = build_vae(preset)
    stage = Stage(
        "teacher-vae", folder, preset.teacher_vae, {"vae": vae}, about={"kl": preset.kl_weight, "eps": preset.vae_eps}
    )
    settings = preset.teacher_vae

    def objective(turn: Turn) -> Losses:
        enlarged, original = pairs.pixels(draw(settings.seed, turn.batch), turn.count)
        x = torch.where(torch.arange(len(original))[:, None, None, None] % 4 == 3, enlarged, original)
        mean, log_variance = vae.moments(x)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(turn.batch))
        found = vae.decode(mean + (log_variance / 2).exp() * noise).float()
        divergence = 0.5 * (mean.float() ** 2 + log_variance.float().exp() - 1 - log_variance.float()).mean()
        l1 = F.l1_loss(found, x)
        loss = l1 + 0.1 * structure_distance(found, x) + preset.kl_weight * divergence
        return Losses(loss, {"l1": l1, "divergence": divergence})

    stage.run(objective, report=report)
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_pairs(vae: nn.Module, pairs: Pairs, path: Path, scaling: float | None = None) -> Latents:
    """Latents of all pairs, cached at `path`; the scaling factor is 1 / standard deviation of the originals'."""
    if path.exists():
        stored = torch.load(path, weights_only=True)
        return Latents(stored["lr"], stored["hr"], float(stored["scaling"]))
    low, high = [], []
    for start in range(0, len(pairs.hr), 32):
        lr = bicubic(to_range(pairs.lr[start : start + 32]))
        hr = to_range(pairs.hr[start : start + 32])
        with torch.autocast("cpu", torch.bfloat16):
            both = vae.encode(channels_last(torch.cat([lr, hr]))).float()  # type: ignore[operator]
        low.append(both[: len(lr)])
        high.append(both[len(lr) :])
    lr, hr = torch.cat(low), torch.cat(high)
    scaling = scaling or float(1 / hr.std())
    latents = Latents((lr * scaling).half(), (hr * scaling).half(), scaling)
    torch.save({"lr": latents.lr, "hr": latents.hr, "scaling": scaling}, path)
    return latents


def train_transformer(
    preset: Preset, latents: Latents, folder: Path, report: Any
) -> tuple[SD3Transformer, Tensor, Tensor]:
    """Stage 2: from the enlarged image's latent to the original's, in one step; L1."""
    torch.manual_seed(preset.seed + 1)
    transformer = SD3Transformer(preset.transformer)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    prompt = torch.randn(1, preset.prompt_tokens, preset.transformer.joint_attention_dim)
    pooled = torch.randn(1, preset.transformer.pooled_projection_dim)
    settings = preset.teacher
    stage = Stage("teacher", folder, settings, {"transformer": transformer}, about=asdict(preset.transformer))

    def objective(turn: Turn) -> Losses:
        z, wanted = latents.windows(turn.batch, settings.seed, turn.count, preset.window)
        loss = F.l1_loss((z - transformer(z, prompt, pooled)).float(), wanted)
        return Losses(loss, {"unchanged": F.l1_loss(z, wanted)})

    stage.run(objective, report=report)
    return transformer.eval().requires_grad_(False), prompt, pooled


def make_teacher(preset: Preset, pairs: Pairs, folder: Path, report: Any) -> tuple[Teacher, Latents]:
    """Both stages; finished ones are loaded from `folder`."""
    vae = train_vae(preset, pairs, folder, report)
    latents = encode_pairs(vae, pairs, folder / "latents.pt")
    transformer, prompt, pooled = train_transformer(preset, latents, folder, report)
    return Teacher(vae, transformer, prompt, pooled, preset), latents
