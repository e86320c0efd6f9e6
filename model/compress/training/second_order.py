"""Real-ESRGAN's second-order degradation (Wang et al., ICCVW 2021, arXiv 2107.10833): blur, resize, noise, JPEG, twice.

The ranges are those of the options that Real-ESRGAN published for training x4 (options/train_realesrgan_x4plus.yml of
github.com/xinntao/Real-ESRGAN); sections 3.2 and 3.3 of the paper describe the steps. Blurs have Gaussian, generalized
Gaussian or plateau-shaped kernels, isotropic or not, or are sinc filters, which ring. All randomness comes from the
generator passed in.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

Rng = np.random.Generator
Kernel = NDArray[np.float64]

SHAPES = ("gaussian", "generalized", "plateau")
MODES = ("area", "bilinear", "bicubic")
KERNEL_SIDES = range(7, 22, 2)
LARGEST_KERNEL = 21


@dataclass(frozen=True)
class Order:
    """One of the two rounds. Ranges are drawn from uniformly; probabilities that do not sum to 1 leave a rest."""

    blur: float = 1.0
    """Probability of any blur."""
    sinc: float = 0.1
    """Probability that a blur is a sinc filter."""
    shapes: tuple[float, ...] = (0.7, 0.15, 0.15)
    """Probabilities of `SHAPES` for the others."""
    anisotropic: tuple[float, ...] = (0.25 / 0.7, 0.2, 0.2)
    """Probability that each of these has two different widths."""
    sigma: tuple[float, float] = (0.2, 3.0)
    """Width of the kernel in pixels."""
    generalized_beta: tuple[float, float] = (0.5, 4.0)
    plateau_beta: tuple[float, float] = (1.0, 2.0)
    enlarge: float = 0.2
    reduce: float = 0.7
    """Probabilities of a resize to more, and to less, than the size."""
    scale: tuple[float, float] = (0.15, 1.5)
    """The smallest and the largest resize."""
    gaussian: float = 0.5
    """Probability that the noise is Gaussian; Poisson otherwise."""
    noise: tuple[float, float] = (1.0, 30.0)
    """Standard deviation of Gaussian noise, of 255."""
    poisson: tuple[float, float] = (0.05, 3.0)
    """Scale of Poisson noise."""
    gray: float = 0.4
    """Probability that the noise is the same in all channels."""
    jpeg: tuple[float, float] = (30.0, 95.0)
    """Quality, on libjpeg's scale."""

    def __post_init__(self) -> None:
        for name, kind in (("sigma", 0), ("generalized_beta", 0), ("plateau_beta", 0), ("scale", 0), ("noise", 0),
                           ("poisson", 0), ("jpeg", 1)):  # fmt: skip
            found = tuple(getattr(self, name))
            if len(found) != 2 or not kind <= found[0] <= found[1] or (name == "jpeg" and found[1] > 100):
                raise ValueError(f"{name}: expected a lower and an upper bound, found {list(found)}")
            object.__setattr__(self, name, found)
        for name in ("shapes", "anisotropic"):
            found = tuple(getattr(self, name))
            if len(found) != len(SHAPES) or not all(0 <= p <= 1 for p in found):
                raise ValueError(f"{name}: expected a probability for each of {', '.join(SHAPES)}, found {list(found)}")
            object.__setattr__(self, name, found)
        if abs(sum(self.shapes) - 1) > 1e-6:
            raise ValueError(f"shapes: expected probabilities that sum to 1, found {list(self.shapes)}")
        for name in ("blur", "sinc", "enlarge", "reduce", "gaussian", "gray"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a probability, found {getattr(self, name)}")
        if self.enlarge + self.reduce > 1:
            raise ValueError(f"enlarge and reduce: expected a sum of at most 1, found {self.enlarge + self.reduce}")


SECOND = Order(
    blur=0.8, sigma=(0.2, 1.5), enlarge=0.3, reduce=0.4, scale=(0.3, 1.2), noise=(1.0, 25.0), poisson=(0.05, 2.5)
)


@dataclass(frozen=True)
class SecondOrder:
    """Both rounds. final_sinc: probability of a sinc filter about the last resize and JPEG, in either order."""

    first: Order = field(default_factory=Order)
    second: Order = field(default_factory=lambda: SECOND)
    final_sinc: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.final_sinc <= 1:
            raise ValueError(f"final_sinc: expected a probability, found {self.final_sinc}")


# ---------------------------------------------------------------------------------------------------------- kernels
def gaussian_like(side: int, shape: str, widths: tuple[float, float], angle: float, beta: float = 1.0) -> Kernel:
    """[side,side], sums to 1: exp(-q/2), generalized exp(-q^beta / 2), or plateau 1 / (q^beta + 1).

    q = v' S^-1 v with S = R(angle) diag(widths^2) R(angle)', v the offset from the middle in pixels.
    """
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = turn @ np.diag([1 / w**2 for w in widths]) @ turn.T
    axis = np.arange(side) - side // 2
    offsets = np.stack(np.meshgrid(axis, axis), axis=-1).astype(np.float64)
    q = np.einsum("yxi,ij,yxj->yx", offsets, inverse, offsets)
    values = 1 / (q**beta + 1) if shape == "plateau" else np.exp(-0.5 * q ** (beta if shape == "generalized" else 1.0))
    return values / values.sum()


def circular_sinc(side: int, cutoff: float) -> Kernel:
    """[side,side], sums to 1: the ideal circular low-pass of `cutoff` (0 to pi) radians per pixel; it rings."""
    axis = np.arange(side) - side // 2
    r = np.hypot(*np.meshgrid(axis, axis)).astype(np.float64)
    r[side // 2, side // 2] = 1.0
    values = cutoff * torch.special.bessel_j1(torch.from_numpy(cutoff * r)).numpy() / (2 * np.pi * r)
    values[side // 2, side // 2] = cutoff**2 / (4 * np.pi)
    return values / values.sum()


def draw_sinc(rng: Rng) -> Kernel:
    """A sinc filter; the smallest ones have no room for low cutoffs."""
    side = int(rng.choice(KERNEL_SIDES))
    return circular_sinc(side, float(rng.uniform(np.pi / 3 if side < 13 else np.pi / 5, np.pi)))


def draw_kernel(order: Order, rng: Rng) -> Kernel:
    """A blur of one round."""
    if rng.random() < order.sinc:
        return draw_sinc(rng)
    side = int(rng.choice(KERNEL_SIDES))
    index = int(rng.choice(len(SHAPES), p=np.array(order.shapes) / sum(order.shapes)))
    shape = SHAPES[index]
    width = float(rng.uniform(*order.sigma))
    other = float(rng.uniform(*order.sigma)) if rng.random() < order.anisotropic[index] else width
    low, high = order.generalized_beta if shape == "generalized" else order.plateau_beta
    # Half of the exponents below 1, where kernels are sharper than a Gaussian's, half above.
    beta = float(rng.uniform(min(low, 1.0), 1.0) if rng.random() < 0.5 else rng.uniform(1.0, max(high, 1.0)))
    return gaussian_like(side, shape, (width, other), float(rng.uniform(-np.pi, np.pi)), beta)


# ------------------------------------------------------------------------------------------------------------- steps
def filtered(x: Tensor, kernel: Kernel) -> Tensor:
    """x [3,H,W] under a kernel, borders reflected."""
    half = kernel.shape[0] // 2
    weight = torch.from_numpy(kernel).float().expand(3, 1, -1, -1)
    padded = F.pad(x[None], (half,) * 4, mode="reflect" if min(x.shape[1:]) > half else "replicate")
    return F.conv2d(padded, weight, groups=3)[0]


def resized(x: Tensor, size: tuple[int, int], rng: Rng) -> Tensor:
    """x [3,H,W] at another size (h, w), without antialiasing but for "area"."""
    mode = str(rng.choice(MODES))
    aligned = None if mode == "area" else False
    return F.interpolate(x[None], size=size, mode=mode, align_corners=aligned)[0]


def with_noise(x: Tensor, order: Order, rng: Rng) -> Tensor:
    """x [3,h,w] in [0,1] with Gaussian or Poisson noise, in [0,1]."""
    pixels = x.numpy().astype(np.float64)
    gray = rng.random() < order.gray
    if rng.random() < order.gaussian:
        sigma = float(rng.uniform(*order.noise)) / 255
        noise = sigma * rng.standard_normal((1 if gray else 3, *x.shape[1:]))
    else:
        # Counts of as many levels as the image has values, as Real-ESRGAN takes them.
        seen = np.clip(np.round(pixels * 255), 0, 255) / 255
        seen = np.tensordot([0.299, 0.587, 0.114], seen, 1)[None] if gray else seen
        levels = 2 ** np.ceil(np.log2(max(len(np.unique(seen)), 2)))
        noise = (rng.poisson(seen * levels) / levels - seen) * float(rng.uniform(*order.poisson))
    return torch.from_numpy(np.clip(pixels + noise, 0, 1)).float()


def as_jpeg(x: Tensor, order: Order, rng: Rng) -> Tensor:
    """x [3,h,w] in [0,1] compressed and decoded."""
    pixels = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=round(float(rng.uniform(*order.jpeg))))
    decoded = np.asarray(Image.open(buffer).convert("RGB"), np.float32) / np.float32(255)
    return torch.from_numpy(decoded).permute(2, 0, 1).contiguous()


def _scale(order: Order, rng: Rng) -> float:
    chance = rng.random()
    if chance < order.enlarge:
        return float(rng.uniform(1.0, max(order.scale[1], 1.0)))
    if chance < order.enlarge + order.reduce:
        return float(rng.uniform(min(order.scale[0], 1.0), 1.0))
    return 1.0


def _scaled(size: Sequence[int], factor: float) -> tuple[int, int]:
    height, width = (max(round(side * factor), 1) for side in size)
    return height, width


def degrade(image: NDArray[np.float32], how: SecondOrder, rng: Rng, factor: int = 4) -> NDArray[np.float32]:
    """image [H,W,3] in [0,1] -> [H/factor,W/factor,3] in [0,1], in steps of 8 bits. H, W: multiples of `factor`."""
    x = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).float()
    size = tuple(x.shape[1:])
    small = size[0] // factor, size[1] // factor
    if rng.random() < how.first.blur:
        x = filtered(x, draw_kernel(how.first, rng))
    x = resized(x, _scaled(size, _scale(how.first, rng)), rng)
    x = as_jpeg(with_noise(x.clamp(0, 1), how.first, rng), how.first, rng)
    if rng.random() < how.second.blur:
        x = filtered(x, draw_kernel(how.second, rng))
    x = resized(x, _scaled(small, _scale(how.second, rng)), rng)
    x = with_noise(x.clamp(0, 1), how.second, rng)
    final = draw_sinc(rng) if rng.random() < how.final_sinc else None
    if rng.random() < 0.5:
        x = _end(x, small, final, rng)
        x = as_jpeg(x, how.second, rng)
    else:
        x = as_jpeg(x, how.second, rng)
        x = _end(x, small, final, rng)
    return ((x.clamp(0, 1) * 255).round() / 255).permute(1, 2, 0).contiguous().numpy()


def _end(x: Tensor, small: tuple[int, int], final: Kernel | None, rng: Rng) -> Tensor:
    x = resized(x, small, rng)
    return x if final is None else filtered(x, final)
