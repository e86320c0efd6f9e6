"""Write a small checkpoint of one's own in the layout `tinysr-unet`, compile it, save it folded and load it again.

python examples/own_checkpoint.py [-o FOLDER]

The network is untrained: small random weights add a faint texture to the bicubic enlargement. The layout is defined
in docs/checkpoints.md; a network that you pruned and trained is written in the same way.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

import tinysr_kernels

ROOT = Path(__file__).resolve().parents[1]
UNSHUFFLE = 2  # the UNet works on PixelUnshuffle(2) of the image: 12 channels
WIDTH = 16  # channels of every residual block
UPSAMPLERS = 3  # 2^3 = 8 = 4 * UNSHUFFLE: the result is four times as large as the image

Tensors = dict[str, torch.Tensor]


def conv(name: str, inputs: int, outputs: int, kernel: int = 3) -> Tensors:
    """A dense convolution with bias."""
    weight = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(outputs)}


def norm(name: str, channels: int) -> Tensors:
    """The affine part of a GroupNorm."""
    return {f"{name}.weight": torch.ones(channels), f"{name}.bias": torch.zeros(channels)}


def resnet(name: str, inputs: int, outputs: int) -> Tensors:
    """A residual block, with a 1x1 shortcut where the widths differ."""
    shortcut = conv(f"{name}.conv_shortcut", inputs, outputs, kernel=1) if inputs != outputs else {}
    return {
        **norm(f"{name}.norm1", inputs),
        **conv(f"{name}.conv1", inputs, outputs),
        **norm(f"{name}.norm2", outputs),
        **conv(f"{name}.conv2", outputs, outputs),
        **shortcut,
    }


def middle(name: str) -> Tensors:
    """A middle block without attention."""
    return resnet(f"{name}.resnets.0", WIDTH, WIDTH) | resnet(f"{name}.resnets.1", WIDTH, WIDTH)


def unet() -> Tensors:
    """One level: a residual block down, the middle, two residual blocks up that each take one skip."""
    return {
        **conv("unet.conv_in", 3 * UNSHUFFLE**2, WIDTH),
        **resnet("unet.down_blocks.0.resnets.0", WIDTH, WIDTH),
        **middle("unet.mid_block"),
        **resnet("unet.up_blocks.0.resnets.0", 2 * WIDTH, WIDTH),
        **resnet("unet.up_blocks.0.resnets.1", 2 * WIDTH, WIDTH),
        **norm("unet.conv_norm_out", WIDTH),
        **conv("unet.conv_out", WIDTH, WIDTH),
    }


def decoder() -> Tensors:
    """The middle, three upsampling blocks, one block at full resolution, and a faint last convolution."""
    tensors = middle("decoder.mid_block")
    for level in range(UPSAMPLERS + 1):
        tensors |= resnet(f"decoder.up_blocks.{level}.resnets.0", WIDTH, WIDTH)
        if level < UPSAMPLERS:
            tensors |= conv(f"decoder.up_blocks.{level}.upsamplers.0.conv", WIDTH, WIDTH)
    tensors |= norm("decoder.conv_norm_out", WIDTH) | conv("decoder.conv_out", WIDTH, 3)
    tensors["decoder.conv_out.weight"] *= 0.02
    return tensors


def write(path: Path) -> None:
    """Write the tensors and the metadata that name the layout."""
    # "bicubic": the network's output is added to the bicubic enlargement of the image.
    config = {"input": "unshuffle", "unshuffle": UNSHUFFLE, "groups": [4], "residual": "bicubic", "color_fix": "none"}
    metadata = {"format": "tinysr_kernels", "family": "tinysr-unet", "version": "1", "config": json.dumps(config)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(unet() | decoder(), path, metadata)


def main() -> None:
    """Write, compile, save, load; both models give the same image."""
    parser = argparse.ArgumentParser(description="Write, compile, save and load a small checkpoint.")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/examples/own_checkpoint"), help="a folder")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    checkpoint = arguments.output / "checkpoint.safetensors"
    write(checkpoint)
    model = tinysr_kernels.compile(checkpoint)
    folded = arguments.output / "folded.safetensors"
    model.save(folded)
    loaded = tinysr_kernels.compile(folded)

    with Image.open(ROOT / "docs/photos/chelsea.jpg") as image:
        result, again = model(image), loaded(image)
    if result.tobytes() != again.tobytes():
        raise SystemExit("the folded file gives another image than the checkpoint")
    result.save(arguments.output / "image.png")
    print(f"{checkpoint}: {model.info()['parameters']} parameters once folded")
    print(f"{folded}: the same model, loads without folding again")
    print(f"{arguments.output / 'image.png'}: {result.width}x{result.height}")


if __name__ == "__main__":
    main()
