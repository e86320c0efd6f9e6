"""What fp8 costs, by emulation on networks of TinySR's structure: `python -m tests.nets.fp8_quality`.

No trained weights of this structure are at hand, so they are random, as large as layers keep their activations (tests/
layouts/weights.py). Random blocks all matter and random weights hold no redundancy. What carries over to another
network is the relative error of the transformer's prediction; how far it shows in the image depends on how large the
prediction is beside the latent that it corrects, so that is set to several values by scaling the last projection.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tests import ROOT
from tests.layouts.tinysr import write_tinysr
from tinysr_kernels.families import TinySRConfig, build, fold, load
from tinysr_kernels.nets import LatentNetwork, fp8, place
from tinysr_kernels.nets.layers import ops
from tinysr_kernels.nets.tinysr_dit import EPS
from tinysr_kernels.ops.linear.quantize import E4M3, LARGEST, quantized

PHOTOS = ROOT / "docs" / "photos"
CPU = torch.device("cpu")
Activation = tuple[Tensor, Tensor]


def photo(name: str, side: int) -> Tensor:
    """A photograph reduced to [1,3,side,side] in [0,1]."""
    with Image.open(PHOTOS / f"{name}.jpg") as picture:
        pixels = np.array(picture.convert("RGB").resize((side, side)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255


def psnr(found: Tensor, expected: Tensor) -> float:
    """In dB, of images in [0,1]."""
    return -10 * float(torch.log10((found.double() - expected.double()).square().mean()))


@dataclass
class Networks:
    """One network in float32, in float16 and in fp8 (the rest in float32), and the latent of a photograph."""

    single: LatentNetwork
    half: LatentNetwork
    fp8: LatentNetwork
    latent: Tensor


def networks(folder: Path, dim: int, layers: int, table: int, name: str = "coffee") -> Networks:
    """Of this width and depth, with windows of table x table tokens, on one of docs/photos."""
    write_tinysr(folder, dim=dim, layers=layers, table=table)
    checkpoint = load(folder)
    assert isinstance(checkpoint.config, TinySRConfig)

    def made(dtype: torch.dtype, quantize: str | None = None) -> LatentNetwork:
        folded = fold("tinysr-dit", checkpoint.config, checkpoint.tensors, dtype, quantize)
        network = build("tinysr-dit", checkpoint.config, place(folded, CPU, dtype))
        assert isinstance(network, LatentNetwork)
        return network

    single = made(torch.float32)
    return Networks(single, made(torch.float16), made(torch.float32, "fp8"), latent(single, name))


def latent(network: LatentNetwork, name: str) -> Tensor:
    """The latent of a photograph that fills one window."""
    side = network.window * network.factor // 4
    found: Tensor = network.encoder(ops.resize_bicubic(photo(name, side), 4))
    return found


def prediction(network: LatentNetwork, z: Tensor) -> Tensor:
    """What the transformer takes away from the latent, in float32."""
    taken = network.transformer(z.to(network.transformer.patch.weight.dtype))
    return z.float() - taken.float()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Of the root mean square."""
    return float((found - expected).norm() / expected.norm())


def image_psnr(network: LatentNetwork, z: Tensor, found: Tensor, expected: Tensor, share: float) -> float:
    """Of the images by two predictions, scaled so that the expected one is `share` of the latent (root mean square)."""
    scale = share * z.norm() / expected.norm()
    images = [network.decoder(z - scale * p).clamp(0, 1) for p in (found, expected)]
    return psnr(*images)


# ------------------------------------------------------------------------------------------- other choices of scales
Quantize = Callable[[str, Tensor], Activation]


class OtherScales(nn.Module):
    """A block of fp8.py whose activations all go through `quantize(name of the linear, values)`."""

    def __init__(self, block: fp8.Block, name: str, quantize: Quantize) -> None:
        super().__init__()
        self.block, self.name, self.quantize = block, name, quantize

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        mixed = ops.attention(self._linear("qkv", ops.layer_norm(x, EPS)), block.heads, block.scale)
        x = self._linear("out", mixed) + x
        hidden = nn.functional.gelu(self._linear("ff1", ops.layer_norm(x, EPS)), approximate="tanh")
        return self._linear("ff2", hidden) + x

    def _linear(self, name: str, v: Tensor) -> Tensor:
        found: Tensor = self.block.get_submodule(name)(self.quantize(f"{self.name}.{name}", v), torch.float32)
        return found


def with_scales(found: Networks, quantize: Quantize) -> Tensor:
    """The prediction with the activations quantized in another way."""
    blocks = found.fp8.transformer.blocks
    kept = list(blocks)
    try:
        for i, block in enumerate(kept):
            assert isinstance(block, fp8.Block)
            blocks[i] = OtherScales(block, str(i), quantize)
        return prediction(found.fp8, found.latent)
    finally:
        for i, block in enumerate(kept):
            blocks[i] = block


def per_row(_: str, v: Tensor) -> Activation:
    """One scale for each token."""
    return quantized(v)


def static_scales(found: Networks, names: tuple[str, ...]) -> Quantize:
    """One scale for each linear: the largest value that these photographs bring it; what is beyond saturates."""
    largest: dict[str, Tensor] = {}

    def note(name: str, v: Tensor) -> Activation:
        largest[name] = torch.maximum(largest.get(name, v.new_zeros(())), v.abs().max())
        return quantized(v)

    here = found.latent
    for name in names:
        found.latent = latent(found.single, name)
        with_scales(found, note)
    found.latent = here

    def fixed(name: str, v: Tensor) -> Activation:
        scale = largest[name] / LARGEST
        return (v / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale.expand(*v.shape[:-1], 1)

    return fixed


@torch.inference_mode()
def main() -> None:
    """Print the table of docs/fp8.md."""
    errors_of = "fp8 | one scale a token | static scales | float16"
    _say(f"| width, blocks, tokens | {errors_of} | prediction / latent | PSNR as it is | at 1 | 1/2 | 1/4 |")
    _say(f"|---|{9 * '---:|'}")
    for dim, layers, table in ((128, 2, 8), (384, 4, 16), (768, 6, 16), (1536, 4, 16)):
        with tempfile.TemporaryDirectory() as folder:
            found = networks(Path(folder), dim, layers, table)
        z, expected = found.latent, prediction(found.single, found.latent)
        others = [per_row, static_scales(found, ("astronaut", "chelsea", "rocket"))]
        predictions = [prediction(found.fp8, z), *(with_scales(found, other) for other in others)]
        errors = [relative_error(p, expected) for p in (*predictions, prediction(found.half, z))]
        share = float(expected.norm() / z.norm())
        images = [image_psnr(found.single, z, predictions[0], expected, s) for s in (share, 1, 0.5, 0.25)]
        cells = [*(f"{100 * e:.2f} %" for e in errors), f"{share:.2f}", *(f"{db:.1f}" for db in images)]
        _say(f"| {dim}, {layers}, {table * table} | {' | '.join(cells)} |")


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
