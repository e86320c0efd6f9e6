"""Encode and decode a photograph with one of diffusers' autoencoders, plain and accelerated, and compare the two.

python examples/diffusers_vae.py [--vae FOLDER] [--quality high] [--turns 1] [-o FOLDER]

Needs diffusers. FOLDER is what `save_pretrained` wrote, or the `vae` folder of a pipeline. Without it the autoencoder
has random weights and its image is noise: the point is that both give the same one. --channels 128 256 512 512 are the
widths of Stable Diffusion's, for measuring.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

import tinysr_kernels

ROOT = Path(__file__).resolve().parents[1]
SIDE = 128  # pixels of the photograph that are used


def random_vae(channels: list[int]) -> Any:
    """An AutoencoderKL in the layout of Stable Diffusion's: four latent channels, two layers per block."""
    torch.manual_seed(0)
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=2,
    )


def photograph() -> torch.Tensor:
    """[1,3,SIDE,SIDE] in [-1,1]."""
    with Image.open(ROOT / "docs/photos/chelsea.jpg") as image:
        pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE)), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]


@torch.inference_mode()
def there_and_back(vae: Any, image: torch.Tensor) -> tuple[torch.Tensor, tuple[float, float]]:
    """The image that encoding and decoding give, and the CPU seconds of each."""
    begin = time.process_time()
    latent = vae.encode(image).latent_dist.mode()
    middle = time.process_time()
    result = vae.decode(latent).sample
    return result, (middle - begin, time.process_time() - middle)


def main() -> None:
    """The plain and the accelerated module in turns; then restored: the plain module's image again, to the bit."""
    parser = argparse.ArgumentParser(description="Accelerate one of diffusers' autoencoders.")
    parser.add_argument("--vae", help="a folder with config.json and weights")
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 32, 64, 64], help="without --vae: its widths")
    parser.add_argument("--quality", choices=["high", "exact"], default="high")
    parser.add_argument("--turns", type=int, default=1, help="measure so often, after one turn that is not counted")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/diffusers_vae"), help="a folder")
    arguments = parser.parse_args()

    vae = arguments.vae
    plain: Any = random_vae(arguments.channels) if vae is None else AutoencoderKL.from_pretrained(vae)
    plain.eval()
    fused = tinysr_kernels.accelerate(copy.deepcopy(plain), quality=arguments.quality)
    image = photograph()
    times = []
    for _ in range(arguments.turns + 1):
        expected, before = there_and_back(plain, image)
        found, after = there_and_back(fused, image)
        times.append((*before, *after))
    restored, _ = there_and_back(tinysr_kernels.restore(fused), image)
    if not torch.equal(restored, expected):
        raise SystemExit("the restored module gives another image")

    arguments.output.mkdir(parents=True, exist_ok=True)
    pixels = (found[0].permute(1, 2, 0).clamp(-1, 1) + 1) * 127.5
    path = arguments.output / "image.png"
    Image.fromarray(pixels.round().to(torch.uint8).numpy()).save(path)
    medians = [statistics.median(column) for column in zip(*times[1:], strict=True)]
    for name, before, after in zip(("encode", "decode"), medians[:2], medians[2:], strict=True):
        print(f"{name}, {SIDE}x{SIDE} pixels, median of CPU seconds {before:.3f} plain, {after:.3f} accelerated")
    print(f"relative difference {float((found - expected).norm() / expected.norm()):.1e}")
    print(f"{path}: {SIDE}x{SIDE}")


if __name__ == "__main__":
    main()
