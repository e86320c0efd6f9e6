"""Random weights of realistic size: activations stay of order one, and nothing is zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from model.reference.kl_decoder import KLDecoder
from model.reference.pruned_unet import SeparableConv
from model.reference.tiny_vae import TinyDecoder, TinyEncoder


def fill(module: nn.Module, seed: int, bias: float = 0.1) -> None:
    """Matrices and kernels N(0, 1/fan-in), biases N(0, bias^2), norms' gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.dim() > 1:
                noise = noise / parameter[0].numel() ** 0.5
            elif name.endswith("weight"):
                noise = 1 + 0.2 * noise
            else:
                noise = bias * noise
            parameter.copy_(noise)
    module.requires_grad_(False)


def fill_tiny(half: TinyEncoder | TinyDecoder, seed: int) -> None:
    """As `fill`, for a half of the tiny VAE: stronger before ReLUs, weaker where residuals add up.

    The last convolution is set so that latents are about N(0, 1), decoded images about 0.5 +- 0.15 of [0,1].
    """
    fill(half, seed)
    with torch.no_grad():
        for name, parameter in half.named_parameters():
            if parameter.dim() > 1 and "depthwise" not in name:
                parameter.mul_(0.5 if ".conv.4." in name else 1.4)
    if isinstance(half, TinyEncoder):
        level(half.layers[-1], half.layers, random_image(64, 64, seed=seed), 0.0, 1.0)
    else:
        level(half.layers[-1], half.layers, _latent(half.layers[0], seed), 0.5, 0.15)


def fill_kl(decoder: KLDecoder, seed: int) -> None:
    """As `fill`, for the KL decoder, whose images are set to about 0 +- 0.3 of [-1,1]."""
    fill(decoder, seed)
    level(decoder.conv_out, decoder, _latent(decoder.mid_block.resnets[0].conv1, seed), 0.0, 0.3)


def _latent(first: nn.Module, seed: int) -> Tensor:
    """N(0, 1) as wide as the network's first convolution takes it."""
    conv = first.depthwise if isinstance(first, SeparableConv) else first
    return torch.randn(1, conv.in_channels, 16, 16, generator=torch.Generator().manual_seed(seed))


def level(last: nn.Module, network: Callable[[Tensor], Tensor], probe: Tensor, mean: float, deviation: float) -> None:
    """Scale and shift the last convolution so that `probe` gives this mean and deviation per channel."""
    conv = last.pointwise if isinstance(last, SeparableConv) else last
    with torch.no_grad():
        conv.bias.zero_()
        found = network(probe)
        gain = deviation / found.std(dim=(0, 2, 3))
        conv.weight.mul_(gain[:, None, None, None])
        conv.bias.copy_(mean - found.mean(dim=(0, 2, 3)) * gain)


def random_image(
    height: int, width: int, *, count: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[count,3,height,width] in [0,1]: smooth shapes under a little noise, every channel different."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator, dtype=torch.float64)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    noise = torch.rand(count, 3, height, width, generator=generator, dtype=torch.float64)
    return (0.8 * smooth + 0.2 * noise).to(dtype)


def rounded(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights to what a file in `dtype` holds, keeping the module's own dtype."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(tensor.to(dtype))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors, without shared memory, and create the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, path, metadata or {"format": "pt"})


def write_pickle(path: Path, value: object) -> None:
    """torch.save, creating the folders above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
