"""Options that the commands share: which models, at which sizes."""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace

from autotune.items.work import Target
from benchmarks.static.plan import parse_gpu, parse_size
from benchmarks.subjects.networks import DTYPES, VARIANTS

GPU = parse_gpu
"""An argparse type: a known GPU, by architecture (90, sm_90) or by part of its name."""


def add_targets(parser: argparse.ArgumentParser) -> None:
    """Add the options that select models."""
    variants = sorted({variant for names in VARIANTS.values() for variant in names})
    parser.add_argument(
        "--family", action="append", choices=VARIANTS, help="model family, at its public size (repeatable; all)"
    )
    parser.add_argument("--variant", choices=variants, help="of the family (default: its first)")
    parser.add_argument("--ckpt", action="append", metavar="CKPT", help='a file, a folder, or "demo" (repeatable)')
    parser.add_argument("--size", action="append", type=parse_size, metavar="HxW", help="input (repeatable; 128x128)")
    parser.add_argument(
        "--batch", action="append", type=positive_int, metavar="N", help="images per batch (repeatable; 1)"
    )
    parser.add_argument(
        "--dtype", action="append", choices=sorted(DTYPES), help="compute dtype (repeatable; the model's own)"
    )
    parser.add_argument("--quantize", choices=("fp8",), help="TinySR's transformer in e4m3, from sm_89 on")


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


def targets(options: argparse.Namespace) -> list[Target]:
    """Every combination of the requested models, sizes, batches and dtypes. ValueError for an unknown variant."""
    families = options.family or ([] if options.ckpt else list(VARIANTS))
    for family in families:
        if options.variant and options.variant not in VARIANTS[family]:
            raise ValueError(f"{family} comes as {', '.join(VARIANTS[family])}, found --variant {options.variant}")
    models = [Target(family, options.variant) for family in families]
    models += [Target(ckpt=ckpt) for ckpt in options.ckpt or ()]
    sizes, batches, dtypes = options.size or [(128, 128)], options.batch or [1], options.dtype or [None]
    return [
        replace(model, size=size, batch=batch, dtype=dtype, quantize=options.quantize)
        for model, size, batch, dtype in itertools.product(models, sizes, batches, dtypes)
    ]
