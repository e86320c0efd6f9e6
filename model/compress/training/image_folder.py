"""Training pairs from a folder of images: random crops, degraded as model/demo/degrade.py degrades them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from model.demo import degrade
from model.reference.pipelines import bicubic

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
PREFETCHED, THREADS = 4, 8


class ImageFolder:
    """Images of a folder and its subfolders, drawn by seed, step and process; square crops of `side` (4 k) pixels."""

    def __init__(self, folder: Path, side: int, seed: int) -> None:
        self.side, self.seed = side, seed
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise ValueError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))})")

    def pairs(self, step: int, count: int, process: int = 0) -> tuple[Tensor, Tensor]:
        """Enlarged and original images [count,3,side,side] in [-1,1]."""
        rng = np.random.default_rng([31, self.seed, step, process])
        large = [self._crop(rng) for _ in range(count)]
        small = [degrade.degrade(image, degrade.random(rng), rng) for image in large]
        lr, hr = (torch.from_numpy(np.stack(p)).permute(0, 3, 1, 2) * 2 - 1 for p in (small, large))
        return bicubic(lr), hr

    def _crop(self, rng: np.random.Generator) -> np.ndarray:
        """A rotated or mirrored crop in [0,1]. Images that are too small are enlarged, unreadable ones skipped."""
        for _ in range(100):
            path = self.paths[int(rng.integers(len(self.paths)))]
            try:
                with Image.open(path) as opened:
                    image = opened.convert("RGB")
            except (OSError, UnidentifiedImageError):
                continue
            least = min(image.size)
            if least < self.side:
                sides = [max(self.side, round(s * self.side / least)) for s in image.size]
                image = image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
            y, x = (int(rng.integers(0, s - self.side + 1)) for s in (image.height, image.width))
            crop = np.asarray(image.crop((x, y, x + self.side, y + self.side)), np.float32) / np.float32(255)
            return np.ascontiguousarray(np.rot90(crop, int(rng.integers(4)))[:: int(rng.choice([-1, 1]))])
        raise ValueError("a hundred images in a row could not be read")


class Prefetcher:
    """Batches prepared by threads in advance; `make(step)` must depend on the step alone."""

    def __init__(self, make: Callable[[int], tuple[Tensor, Tensor]]) -> None:
        self._make = make
        self._pool = ThreadPoolExecutor(THREADS)
        self._waiting: dict[int, Future[tuple[Tensor, Tensor]]] = {}

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        for number in range(step, step + PREFETCHED):
            if number not in self._waiting:
                self._waiting[number] = self._pool.submit(self._make, number)
        for number in [n for n in self._waiting if n < step]:
            self._waiting.pop(number).cancel()
        return self._waiting.pop(step).result()
