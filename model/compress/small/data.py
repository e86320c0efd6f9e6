"""Pairs of procedural images and their degraded quarters, and batches drawn from them by seed and step alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.compress.small.preset import Preset
from model.demo import degrade, synthetic
from model.reference.pipelines import bicubic

IMAGES, CROPS, DRAWS = 11, 12, 13
"""First numbers of the seeds, so that this run's images are those of no other."""
SIDE = 128
PIXELS = 4
"""Pixels of the image per latent and per pixel of the degraded quarter."""


@dataclass
class Pairs:
    """hr [K,3,128,128] and lr [K,3,32,32], uint8."""

    hr: Tensor
    lr: Tensor

    def pixels(self, rng: np.random.Generator, count: int, side: int = 64) -> tuple[Tensor, Tensor]:
        """Random turned squares: the bicubic enlargement of the degraded ones and the originals, in [-1,1]."""
        low, high = [], []
        for index in rng.integers(len(self.hr), size=count):
            y, x = (int(v) for v in rng.integers(0, (SIDE - side) // PIXELS + 1, 2))
            s = side // PIXELS
            turn, flip = int(rng.integers(4)), bool(rng.integers(2))
            low.append(_turned(self.lr[index, :, y : y + s, x : x + s], turn, flip))
            y, x = PIXELS * y, PIXELS * x
            high.append(_turned(self.hr[index, :, y : y + side, x : x + side], turn, flip))
        lr = to_range(torch.stack(low))
        return channels_last(bicubic(lr)), channels_last(to_range(torch.stack(high)))


def color_jitter(images: list[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """The same change of color on every tensor [N,3,H,W]: channels swapped, saturation times 0.5 to 2.5, per sample.

    Procedural palettes are as pale as photographs are on average; a decoder trained on them alone lets what is more
    saturated fade.
    """
    count = len(images[0])
    order = torch.from_numpy(np.stack([rng.permutation(3) for _ in range(count)]))
    factor = torch.from_numpy(rng.uniform(0.5, 2.5, (count, 1, 1, 1)).astype(np.float32))
    changed = []
    for x in images:
        swapped = x[torch.arange(count)[:, None], order]
        gray = swapped.mean(dim=1, keepdim=True)
        changed.append(channels_last((gray + factor * (swapped - gray)).clamp(-1, 1)))
    return changed


def draw(seed: int, step: int, process: int = 0) -> np.random.Generator:
    """The generator of one step's batch."""
    return np.random.default_rng([DRAWS, seed, step, process])


def to_range(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1,1]."""
    return images.float() / 127.5 - 1


def channels_last(x: Tensor) -> Tensor:
    """The same in channels-last memory, which convolutions on CPUs are fastest in."""
    return x.contiguous(memory_format=torch.channels_last)


def _turned(x: Tensor, turn: int, flip: bool) -> Tensor:
    x = torch.rot90(x, turn, (1, 2))
    return x.flip(2) if flip else x


def pairs(preset: Preset, folder: Path) -> Pairs:
    """The run's pairs, made once and kept in `folder`."""
    path = folder / f"pairs-{preset.seed}-{preset.images}-{preset.crops}.npz"
    if not path.exists():
        made = [_pairs_of(preset, number) for number in range(preset.images)]
        hr, lr = (np.concatenate([pair[i] for pair in made]) for i in (0, 1))
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.stem + ".part.npz")
        np.savez(beside, hr=hr, lr=lr)
        os.replace(beside, path)
    with np.load(path) as stored:
        return Pairs(*(torch.from_numpy(stored[name]).permute(0, 3, 1, 2) for name in ("hr", "lr")))


def _pairs_of(preset: Preset, number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Crops of one image, each degraded in its own way: [crops,128,128,3] and [crops,32,32,3]."""
    image = synthetic.image(np.random.default_rng([IMAGES, preset.seed, number]))
    rng = np.random.default_rng([CROPS, preset.seed, number])
    high, low = [], []
    for _ in range(preset.crops):
        y, x = rng.integers(0, image.shape[0] - SIDE + 1, 2)
        crop = image[y : y + SIDE, x : x + SIDE]
        high.append(crop)
        small = degrade.degrade(crop.astype(np.float32) / np.float32(255), degrade.random(rng), rng)
        low.append(np.round(small * 255).astype(np.uint8))
    return np.stack(high), np.stack(low)
