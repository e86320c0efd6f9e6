"""`python -m benchmarks quality`: a checkpoint over photographs, in every dtype, backend and quantization.

PSNR and SSIM against the originals, beside bicubic's, and PSNR against our own float32 result on the reference backend:
the loss from dtype, our kernels or quantization. Photographs and degradation are those of model/demo.
Without a GPU: three photographs, unless --photographs asks for more, and the reference backend alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tinysr_kernels
from benchmarks.measure import session as sessions
from benchmarks.measure.results import Record, Results
from benchmarks.measure.session import Session, session

SUMMARY = "PSNR and SSIM of a checkpoint, by default the demo, over photographs per dtype, backend and quantization."
ON_CPU = 3
"""Photographs that a CPU enlarges."""
Image = NDArray[np.uint8]
IDENTICAL = 100.0
"""PSNR reported for identical images."""


@dataclass(frozen=True)
class Way:
    """How the model is compiled."""

    dtype: str
    backend: str
    quantize: str | None = None

    @property
    def labels(self) -> dict[str, str]:
        """The labels of its records."""
        return {"dtype": self.dtype, "backend": self.backend, "quantize": self.quantize or "none"}

    @property
    def key(self) -> str:
        """Identifies it."""
        return f"{self.dtype} {self.backend}" + (f" {self.quantize}" if self.quantize else "")


def ways(cuda: bool) -> list[Way]:
    """All configurations, the baseline first."""
    dtypes, backends = ("float32", "float16", "bfloat16"), ("reference", "triton") if cuda else ("reference",)
    found = [Way(dtype, backend) for backend in backends for dtype in dtypes]
    return [*found, Way("float16" if cuda else "float32", backends[-1], "fp8")]


def psnr(a: Image, b: Image) -> float:
    """In dB over RGB, at most IDENTICAL."""
    difference = a.astype(np.float64) - b.astype(np.float64)
    return IDENTICAL if not difference.any() else float(10 * np.log10(255**2 / np.square(difference).mean()))


def images_of(made: Session, photographs: int | None = None) -> list[tuple[str, Image, Image]]:
    """(name, original [4H,4W,3], degraded quarter [H,W,3]). ImportError without scikit-image, which has them."""
    from model.demo import degrade, photos
    from model.demo.evaluate import degraded

    names = photos.NAMES[: photographs or (len(photos.NAMES) if made.cuda else ON_CPU)]
    return [(name, *degraded(name, degrade.EVALUATION)) for name in names]


def measure(made: Session, ckpt: str = "demo", photographs: int | None = None) -> None:
    """One record a way and photograph, and one with the means."""
    images: list[tuple[str, Image, Image]] = []
    with made.guarded("photographs", {"photograph": "all"}):
        images = images_of(made, photographs)
    base: dict[str, Image] = {}
    for way in ways(made.cuda) if images else ():
        if base and made.sink.has(way.key):
            continue
        with made.guarded(way.key, way.labels):
            arguments: dict[str, Any] = {"dtype": way.dtype, "backend": way.backend, "quantize": way.quantize}
            model = tinysr_kernels.compile(ckpt, device=made.device, **arguments)
            records = []
            for name, original, small in images:
                ours = model(small)
                base.setdefault(name, ours)
                records.append(_compared(way, name, original, small, ours, base[name]))
            means = {k: float(np.mean([one.values[k] for one in records])) for k in records[0].values}
            made.sink.add(*records, Record(way.key, way.labels | {"photograph": "mean"}, values=means))


def _compared(way: Way, name: str, original: Image, small: Image, ours: Image, base: Image) -> Record:
    from skimage.metrics import structural_similarity

    from model.demo.evaluate import bicubic

    usual = bicubic(small)
    values = {
        "psnr": psnr(original, ours),
        "ssim": float(structural_similarity(original, ours, channel_axis=2)),
        "bicubic_psnr": psnr(original, usual),
        "bicubic_ssim": float(structural_similarity(original, usual, channel_axis=2)),
        "psnr_to_float32": psnr(base, ours),
    }
    return Record(f"{way.key}: {name}", way.labels | {"photograph": name}, values=values)


def table(results: Results) -> list[str]:
    """One line per way: means over the photographs."""
    lines = [f"{'':<28} {'PSNR':>7} {'SSIM':>7} {'bicubic':>8} {'':>7} {'to float32':>10}"]
    for one in results.records:
        if one.error:
            lines.append(f"{one.key:<28} {one.error}")
        elif one.labels["photograph"] == "mean":
            v = one.values
            lines.append(
                f"{one.key:<28} {v['psnr']:>7.3f} {v['ssim']:>7.4f} {v['bicubic_psnr']:>8.3f} "
                f"{v['bicubic_ssim']:>7.4f} {v['psnr_to_float32']:>10.2f}"
            )
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    sessions.add_arguments(parser)
    parser.add_argument("--ckpt", default="demo", help="what compile() takes (default: the demo)")
    parser.add_argument("--photographs", type=int, metavar="N", help="the first N (default: all on a GPU, else 3)")


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    with session("quality", options) as made:
        measure(made, options.ckpt, options.photographs)
    for line in table(made.sink.results):
        print(line)
    return 0
