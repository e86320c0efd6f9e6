"""Losses of the recipe: latent, perceptual and adversarial; the stages that use them hold the paper's weights.

Perceptual loss is LPIPS (arXiv 1801.03924, VGG features) where the package `lpips` or `pyiqa` is installed and the
weights it needs are already in torch's cache; nothing is downloaded. Otherwise a substitute without learned weights is
used, and every log says so: at three scales 1 - SSIM (Wang et al. 2004) and the L1 distance of the image gradients,
plus the L1 distance of the images.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

Distance = Callable[[Tensor, Tensor], Tensor]
SCALES = 3
SSIM_WINDOW = 7


def latent_distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of latents [N,C,h,w]: the loss of the encoder."""
    return F.mse_loss(found.float(), wanted.float())


# ------------------------------------------------------------------------------------------------------- perception
def perceptual(device: torch.device | str = "cpu") -> tuple[str, Distance]:
    """(name, distance) of the best available perceptual loss, for images [N,3,H,W] in [-1,1]; the mean over N."""
    cache = Path(torch.hub.get_dir())
    vgg = (cache / "checkpoints" / "vgg16-397923af.pth").exists()
    if vgg and importlib.util.find_spec("lpips"):
        network = importlib.import_module("lpips").LPIPS(net="vgg", verbose=False).eval().to(device)
        network.requires_grad_(False)
        return "lpips (VGG)", lambda a, b: network(a, b).mean()
    if vgg and importlib.util.find_spec("pyiqa") and list((cache / "pyiqa").glob("LPIPS_v0.1_vgg*.pth")):
        metric = importlib.import_module("pyiqa").create_metric("lpips-vgg", as_loss=True, device=device)
        return "pyiqa lpips-vgg", lambda a, b: metric((a / 2 + 0.5).clamp(0, 1), b / 2 + 0.5).mean()
    return "substitute: SSIM, differences and levels", substitute


def substitute(a: Tensor, b: Tensor) -> Tensor:
    """`structure_distance` plus the L1 distance: with structure alone saturated colors fade."""
    return structure_distance(a, b) + F.l1_loss(a.float(), b.float())


def structure_distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over three scales, each half the last, of 1 - SSIM plus the L1 distance of the first differences.

    Images [N,3,H,W] in [-1,1], sides of at least 7 at every scale that is used; smaller scales are left out.
    """
    a, b = a.float(), b.float()
    terms = []
    for _ in range(SCALES):
        if min(a.shape[2:]) < SSIM_WINDOW:
            break
        terms.append(1 - ssim(a, b) + differences(a, b))
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return torch.stack(terms).mean()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity over windows of 7x7 of images in [-1,1] (a range of 2)."""
    mean_a, mean_b = F.avg_pool2d(a, SSIM_WINDOW, 1), F.avg_pool2d(b, SSIM_WINDOW, 1)
    # Moments about the common level: the plain difference of squares loses digits on flat regions.
    level = mean_a.mean(dim=(2, 3), keepdim=True)
    x, y = a - level, b - level
    mean_x, mean_y = mean_a - level, mean_b - level
    variance_x = F.avg_pool2d(x * x, SSIM_WINDOW, 1) - mean_x**2
    variance_y = F.avg_pool2d(y * y, SSIM_WINDOW, 1) - mean_y**2
    covariance = F.avg_pool2d(x * y, SSIM_WINDOW, 1) - mean_x * mean_y
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    brightness = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (brightness * (2 * covariance + c2) / (variance_x + variance_y + c2)).mean()


def differences(a: Tensor, b: Tensor) -> Tensor:
    """L1 distance of the differences between neighboring pixels, down and across."""
    error = a - b
    return (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()) / 2


# ---------------------------------------------------------------------------------------------------------- adversary
class Discriminator(nn.Module):
    """PatchGAN discriminator with spectral normalization: image [N,3,H,W] -> scores [N,1,H/8,W/8]."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(inputs, outputs, 4, 2, 1)), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def generator_hinge_loss(discriminator: nn.Module, fake: Tensor) -> Tensor:
    """The generator's side of the hinge loss."""
    return -discriminator(fake).float().mean()


def discriminator_hinge_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's side of the hinge loss; `fake` is detached here."""
    return (F.relu(1 - discriminator(real).float()) + F.relu(1 + discriminator(fake.detach()).float())).mean()
