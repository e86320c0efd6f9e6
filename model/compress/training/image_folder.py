"""Training pairs from folders: random crops of originals, degraded here or cut from given low-resolution images."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from model.compress.training.second_order import SecondOrder, degrade
from model.reference.pipelines import bicubic

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
PREFETCHED, THREADS, FACTOR = 4, 8, 4
Pixels = NDArray[np.float32]


class ImageFolder:
    """Images of a folder and its subfolders, drawn by seed, step and process; square crops of `side` (4 k) pixels.

    low: folder of low-resolution images of the same names (the suffix may differ), a quarter of the originals' size;
    otherwise originals are degraded. ValueError if there are no images, or an original has no low-resolution image.
    """

    def __init__(
        self, folder: Path, side: int, seed: int, *, degradation: SecondOrder | None = None, low: Path | None = None
    ) -> None:
        self.side, self.seed, self.degradation = side, seed, degradation or SecondOrder()
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise ValueError(f"{folder}: no images ({', '.join(sorted(SUFFIXES))})")
        self.low = None if low is None else [_partner(path, folder, low) for path in self.paths]

    def pairs(self, step: int, count: int, process: int = 0) -> tuple[Tensor, Tensor]:
        """Enlarged and original images [count,3,side,side] in [-1,1]."""
        rng = np.random.default_rng([31, self.seed, step, process])
        drawn = [self._pair(rng) for _ in range(count)]
        lr, hr = (torch.from_numpy(np.stack(one)).permute(0, 3, 1, 2) * 2 - 1 for one in zip(*drawn, strict=True))
        return bicubic(lr), hr

    def _pair(self, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
        """A crop in [0,1], rotated and mirrored, and its quarter; images that cannot be read are skipped."""
        for _ in range(100):
            index = int(rng.integers(len(self.paths)))
            try:
                image = _read(self.paths[index])
                small = None if self.low is None else _read(self.low[index])
            except (OSError, UnidentifiedImageError):
                continue
            if small is not None:
                return self._cut(image, small, self.paths[index], rng)
            large = _turned(self._crop(image, rng), rng)
            return degrade(large, self.degradation, rng, FACTOR), large
        raise ValueError("a hundred images in a row could not be read")

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> Pixels:
        """A crop; images that are too small are enlarged."""
        least = min(image.size)
        if least < self.side:
            sides = [max(self.side, round(s * self.side / least)) for s in image.size]
            image = image.resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
        y, x = (int(rng.integers(0, s - self.side + 1)) for s in (image.height, image.width))
        return _pixels(image.crop((x, y, x + self.side, y + self.side)))

    def _cut(
        self, image: Image.Image, small: Image.Image, path: Path, rng: np.random.Generator
    ) -> tuple[Pixels, Pixels]:
        """The same crop of both images of a pair."""
        if image.size != tuple(FACTOR * s for s in small.size):
            raise ValueError(f"{path}: expected {FACTOR} times the size of its low-resolution image {small.size}")
        quarter = self.side // FACTOR
        if min(small.size) < quarter:
            raise ValueError(f"{path}: smaller than the {self.side} pixels of a crop")
        y, x = (int(rng.integers(0, s - quarter + 1)) for s in (small.height, small.width))
        how = rng.bit_generator.state
        low = _turned(_pixels(small.crop((x, y, x + quarter, y + quarter))), rng)
        rng.bit_generator.state = how
        box = [FACTOR * at for at in (x, y, x + quarter, y + quarter)]
        return low, _turned(_pixels(image.crop((box[0], box[1], box[2], box[3]))), rng)


def _partner(path: Path, folder: Path, low: Path) -> Path:
    """The low-resolution image of an original."""
    stem = low / path.relative_to(folder).with_suffix("")
    found = [p for p in (stem.with_name(stem.name + suffix) for suffix in sorted(SUFFIXES)) if p.exists()]
    if len(found) != 1:
        raise ValueError(f"{path}: expected one image {stem} with one of {', '.join(sorted(SUFFIXES))}, found {found}")
    return found[0]


def _read(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, np.float32) / np.float32(255)


def _turned(crop: Pixels, rng: np.random.Generator) -> Pixels:
    """Rotated by quarters and mirrored at random."""
    return np.ascontiguousarray(np.rot90(crop, int(rng.integers(4)))[:: int(rng.choice([-1, 1]))])


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
