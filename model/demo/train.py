"""Train the demonstration checkpoint on a CPU: `python -m model.demo.train --out demo.safetensors`.

About an hour on two cores with bfloat16 instructions, no data set, no accelerator. The outcome is a function of the
seed and the number of steps: every step draws its batch from a generator seeded with (seed, step), so an interrupted
run continues from its state file as if nothing had happened. Progress is judged on synthetic images that training
never draws; photographs are left to model/demo/evaluate.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from model.demo import degrade, synthetic
from model.reference.unet_shapes import decoder_shapes, unet_shapes
from model.reference.unet_sr import UNetSR
from tinysr_kernels.families import UNetConfig

# Architecture. The level at output resolution takes most of the time, so it is narrow with one resnet; width and depth
# at half the input resolution are nearly free.
CONFIG = UNetConfig(groups=(8, 4, 2, 1), residual="bicubic", color_fix="none")
UNET_CHANNELS, UNET_LAYERS = (96, 128, 128), 3
DECODER_CHANNELS, DECODER_LAYERS = (16, 32, 64, 96), 1

TRAINING_IMAGES, VALIDATION_IMAGES = 1, 2  # the first number of their seeds


@dataclass(frozen=True)
class Settings:
    """How long and how the network is trained."""

    steps: int = 5500
    seed: int = 0
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    pool: int = 240
    """Number of images in the pool; one is replaced every `refresh` steps."""
    refresh: int = 8
    ema_decay: float = 0.999
    precision: str = "bfloat16"


def build(seed: int) -> UNetSR:
    """The untrained network; its last convolution is zero, so it starts as a bicubic enlargement."""
    torch.manual_seed(seed)
    unet = unet_shapes(3 * CONFIG.unshuffle**2, DECODER_CHANNELS[-1], UNET_CHANNELS, UNET_LAYERS, separable=True)
    decoder = decoder_shapes(DECODER_CHANNELS, DECODER_LAYERS, separable=True, attention=False)
    named = {f"unet.{k}": v for k, v in unet.items()} | {f"decoder.{k}": v for k, v in decoder.items()}
    network = UNetSR(named, CONFIG)
    last = network.decoder.conv_out
    for value in last.parameters():
        nn.init.zeros_(value)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network


# --------------------------------------------------------------------------------------------------------- data
class Pool:
    """Images [384,384,3] uint8 to crop patches from; its content depends only on seed and step."""

    def __init__(self, settings: Settings, step: int) -> None:
        self.settings = settings
        self.images = [self._image(self._number(slot, step)) for slot in range(settings.pool)]

    def _image(self, number: int) -> NDArray[np.uint8]:
        return synthetic.image(np.random.default_rng([TRAINING_IMAGES, self.settings.seed, number]))

    def _number(self, slot: int, step: int) -> int:
        """The image in `slot` at `step`: slots are replaced cyclically."""
        replaced = step // self.settings.refresh
        rounds = (replaced - slot + self.settings.pool - 1) // self.settings.pool
        return slot + rounds * self.settings.pool

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """LR [N,3,h,w] and HR [N,3,4h,4w] in [-1,1]: eight patches of 48, or two of 96 in every fourth step.

        GroupNorm's statistics come from the whole input, so the network has to see more than one size.
        """
        rng = np.random.default_rng([TRAINING_IMAGES, self.settings.seed, 0, step])
        number, side = (2, 96) if step % 4 == 3 else (8, 48)
        patches = []
        for index in rng.integers(len(self.images), size=number):
            image = self.images[index]
            y, x = rng.integers(0, image.shape[0] - 4 * side + 1, 2)
            patch = image[y : y + 4 * side, x : x + 4 * side]
            patch = np.rot90(patch, int(rng.integers(4)))[:: rng.choice([-1, 1])]
            patches.append(patch.astype(np.float32) / np.float32(255))
        ways = [degrade.random(rng) for _ in patches]
        small = degrade.reduce(patches, [degrade.kernel(way) for way in ways])
        degraded_image = [degrade.add_noise_and_jpeg(image, way, rng) for image, way in zip(small, ways, strict=True)]
        if (step + 1) % self.settings.refresh == 0:
            slot = ((step + 1) // self.settings.refresh - 1) % self.settings.pool
            self.images[slot] = self._image(self._number(slot, step + 1))
        return to_tensor(degraded_image), to_tensor(patches)


def to_tensor(images: list[Any]) -> Tensor:
    """Images [H,W,3] in [0,1] -> [N,3,H,W] in [-1,1], channels last in memory."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) * 2 - 1


def validation_set(number: int = 12) -> list[tuple[Tensor, Tensor]]:
    """Held-out synthetic images under the evaluation's degradation: LR [1,3,64,64], HR [1,3,256,256]."""
    pairs = []
    for k in range(number):
        rng = np.random.default_rng([VALIDATION_IMAGES, k])
        large = synthetic.image(rng)[:256, :256].astype(np.float32) / np.float32(255)
        pairs.append((to_tensor([degrade.degrade(large, degrade.EVALUATION, rng)]), to_tensor([large])))
    return pairs


def psnr(sr: Tensor, hr: Tensor) -> float:
    """PSNR in dB of images in [-1,1], after clamping."""
    return -10 * math.log10(float(((sr.clamp(-1, 1) - hr) / 2).square().mean()) + 1e-12)


@torch.no_grad()
def validate(network: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean PSNR of the network and of bicubic enlargement."""
    ours = [psnr(network(lr), hr) for lr, hr in pairs]
    bicubic = [psnr(F.interpolate(lr, scale_factor=4.0, mode="bicubic"), hr) for lr, hr in pairs]
    return sum(ours) / len(ours), sum(bicubic) / len(bicubic)


# ----------------------------------------------------------------------------------------------------- training
def loss_of(sr: Tensor, hr: Tensor) -> Tensor:
    """Mean over the batch of the logarithm of each image's mean squared error: proportional to the negative PSNR.

    Lightly and heavily degraded images have equal weight (the "PSNR loss" of HINet, Chen et al., arXiv 2105.06086). The
    constant limits the weight of flat images.
    """
    return ((sr - hr).square().mean(dim=(1, 2, 3)) + 1e-4).log().mean()


def learning_rate(step: int, settings: Settings) -> float:
    """Learning rate: linear warm-up, then cosine decay to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class Trainer:
    """The network, its moving average, the optimizer and the step they are at."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.network = build(settings.seed)
        self.average = build(settings.seed)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=1e-4)
        self.step = 0

    def train_step(self, lr: Tensor, hr: Tensor) -> float:
        """One step of optimization; returns the loss."""
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.settings)
        bfloat16 = self.settings.precision == "bfloat16"
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            sr = self.network(lr.contiguous(memory_format=torch.channels_last))
        loss = loss_of(sr.float(), hr)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # Early on, the average must forget the random start quickly.
        keep = min(self.settings.ema_decay, self.step / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.network.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        return float(loss.detach())

    def save_state(self, path: Path) -> None:
        """Write everything needed to resume, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        beside = path.with_name(path.name + ".part")
        torch.save(state, beside)
        os.replace(beside, path)

    def load_state(self, path: Path) -> None:
        """Resume from `path`; ValueError if it belongs to other settings."""
        state = torch.load(path, weights_only=True)
        if state["settings"] != asdict(self.settings):
            raise ValueError(f"{path} was written with {state['settings']}; remove it or use the same settings")
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def export(network: UNetSR, path: Path) -> None:
    """Write the checkpoint: float16 safetensors with family and configuration as metadata, atomically."""
    tensors = {name: t.detach().half().contiguous() for name, t in network.state_dict().items()}
    metadata = {
        "format": "tinysr_kernels",
        "family": "tinysr-unet",
        "version": "1",
        "config": json.dumps(asdict(network.config)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_bytes(save(tensors, metadata))
    os.replace(beside, path)


def train(settings: Settings, out: Path, state: Path, every: int = 250) -> None:
    """Run or resume the training; writes a usable checkpoint to `out` every `every` steps."""
    trainer = Trainer(settings)
    if state.exists():
        trainer.load_state(state)
        print(f"going on from step {trainer.step}", flush=True)
    print(f"{sum(p.numel() for p in trainer.network.parameters())} parameters; making images", flush=True)
    pool, pairs = Pool(settings, trainer.step), validation_set()
    start, first, losses = time.monotonic(), trainer.step, []
    while trainer.step < settings.steps:
        losses.append(trainer.train_step(*pool.batch(trainer.step)))
        if trainer.step % 50 == 0:
            pace = (time.monotonic() - start) / (trainer.step - first)
            line = f"step {trainer.step}/{settings.steps}  loss {sum(losses) / len(losses):.5f}  {pace:.3f} s/step"
            losses = []
            if trainer.step % every == 0 or trainer.step == settings.steps:
                ours, bicubic = validate(trainer.average, pairs)
                line += f"  validation {ours:.3f} dB, bicubic {bicubic:.3f} dB"
                export(trainer.average, out)
                trainer.save_state(state)
            print(line, flush=True)
    export(trainer.average, out)


def main() -> None:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tinysr_kernels/checkpoint/demo.safetensors"))
    parser.add_argument("--state", type=Path, default=Path("build/demo-training.pt"), help="file to resume from")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default=defaults.precision,
        help="of the forward and backward pass; bfloat16 is slow on CPUs without instructions for it",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(Settings(steps=args.steps, seed=args.seed, precision=args.precision), args.out, args.state)


if __name__ == "__main__":
    main()
