"""`python -m benchmarks plan`: every launch of a compiled model in order, with FLOPs, bytes and a floor per GPU.

Traced from the dispatch on meta tensors: a uint8 image goes through the compiled model, and every kernel launch is
recorded, of our operators and of ATen operations between them. No GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import CARDS, floors
from benchmarks.subjects.families import META
from benchmarks.subjects.networks import DTYPES, OWN_DTYPE, VARIANTS, network
from tinysr_kernels.launch.device import GPUS, Gpu, assume
from tinysr_kernels.ops.trace import Call, Step, trace
from tinysr_kernels.runtime.compiled import CompiledSR
from tinysr_kernels.runtime.images.arrays import enlarge_batch

SUMMARY = "Every launch of a compiled model in order, with FLOPs, bytes and floor per GPU; needs no GPU."
DEFAULT_GPU = GPUS[90]


@dataclass(frozen=True)
class Row:
    """One launch. inputs, output: shapes of the tensors it reads, and of the largest tensor it writes.

    bytes: of every tensor that it reads or writes, counted once; the sum of activation_bytes and weight_bytes.
    """

    op: str
    part: str
    kernel: str
    source: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    flops: int
    bytes: int
    activation_bytes: int
    weight_bytes: int
    floor_us: Mapping[str, float]


@dataclass(frozen=True)
class ModelPlan:
    """All launches for one image or batch, with the requested settings."""

    family: str
    variant: str
    size: tuple[int, int]
    batch: int
    dtype: str
    gpu: str
    rows: tuple[Row, ...]

    def totals(self, rows: Iterable[Row] | None = None) -> dict[str, Any]:
        """Total launches, FLOPs, bytes and floors of some rows (default: all)."""
        chosen = self.rows if rows is None else tuple(rows)
        return {
            "launches": len(chosen),
            **{
                name: sum(getattr(row, name) for row in chosen)
                for name in ("flops", "bytes", "activation_bytes", "weight_bytes")
            },
            "floor_us": {card.short: round(sum(row.floor_us[card.short] for row in chosen), 3) for card in CARDS},
        }

    def grouped(self, key: Callable[[Row], str]) -> dict[str, dict[str, Any]]:
        """Totals of the rows with the same key, in order of first occurrence."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return {name: self.totals(rows) for name, rows in groups.items()}

    def to_json(self) -> dict[str, Any]:
        """The content of the `--json` file."""
        head = {name: getattr(self, name) for name in ("family", "variant", "batch", "dtype", "gpu")}
        launches = []
        for row in self.rows:
            floor = {name: round(us, 4) for name, us in row.floor_us.items()}
            launches.append({**vars(row), "floor_us": floor})
        size = f"{self.size[0]}x{self.size[1]}"
        groups = {"parts": self.grouped(_part), "operators": self.grouped(operator_of)}
        return {**head, "size": size, "totals": self.totals(), **groups, "launches": launches}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """One line per entry and per launch, so that files can be diffed."""
    lines = {name: json.dumps(value) for name, value in content.items() if name != "launches"}
    launches = ",\n  ".join(json.dumps(launch) for launch in content["launches"])
    entries = [f'"{name}": {text}' for name, text in lines.items()] + [f'"launches": [\n  {launches}\n ]']
    path.write_text("{\n " + ",\n ".join(entries) + "\n}\n", encoding="utf-8")


def _part(row: Row) -> str:
    return row.part


def operator_of(row: Row) -> str:
    """The group of a launch: its operator, or an ATen copy inside it."""
    return f"{row.op}: {row.kernel}" if row.kernel.startswith("aten::") and row.kernel != row.op else row.op


def calls(
    model: CompiledSR, height: int, width: int, batch: int = 1, gpu: Gpu = DEFAULT_GPU, *, plan_launches: bool = True
) -> list[Call]:
    """The calls of a compiled model on meta tensors for `batch` uint8 images of this size.

    gpu: to plan launches for; plan_launches=False records every call as a single step.
    """
    image = torch.empty((batch, 3, height, width), dtype=torch.uint8, device=META)
    parts = {name: module for name, module in model.network.named_children() if name != "residual"}
    with assume(gpu):
        return trace(
            lambda: enlarge_batch(image, model.enlarge, model.upscale),
            kernels=plan_launches,
            parts=parts,
            ends=("resize", "color"),
        )


def plan(
    family: str,
    size: tuple[int, int] = (128, 128),
    *,
    batch: int = 1,
    dtype: str | None = None,
    variant: str | None = None,
    gpu: Gpu = DEFAULT_GPU,
) -> ModelPlan:
    """The launches of a family at its public size (`networks.network`), from the uint8 image to the uint8 image."""
    dtype = dtype or OWN_DTYPE[family]
    variant = variant or VARIANTS[family][0]
    model = network(family, variant, DTYPES[dtype])
    found = calls(model, *size, batch, gpu)
    steps = [(call, step) for call in found for step in call.steps]
    weights = sum(t.nbytes for t in model.network.buffers())
    times = floors((step for _, step in steps), dtype == "float32", weights)
    rows = tuple(_row(call, step, floor) for (call, step), floor in zip(steps, times, strict=True))
    return ModelPlan(family, variant, size, batch, dtype, gpu.name, rows)


def _row(call: Call, step: Step, floor: Mapping[str, float]) -> Row:
    largest = max(step.writes, key=lambda moved: moved.bytes, default=None)
    weights = sum(moved.bytes for moved in step.moved if moved.weight)
    return Row(
        call.op,
        call.part,
        step.kernel,
        call.source,
        tuple(moved.shape for moved in step.reads),
        () if largest is None else largest.shape,
        step.flops,
        step.bytes,
        step.bytes - weights,
        weights,
        floor,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--family", required=True, choices=VARIANTS)
    parser.add_argument("--size", type=parse_size, default=(128, 128), metavar="HxW", help="input pixels (128x128)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per batch (default 1)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the family's own on a GPU")
    parser.add_argument(
        "--variant", choices=sorted({v for known in VARIANTS.values() for v in known}), help="its first"
    )
    parser.add_argument(
        "--gpu", type=parse_gpu, default=DEFAULT_GPU, help="the GPU to plan launches for: its name, or 80, 86, ... (90)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all launches to this file")


def parse_size(text: str) -> tuple[int, int]:
    """ "128x96" -> (128, 96). ArgumentTypeError for anything else."""
    found = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"expected height and width such as 128x128, found {text!r}")
    return int(found[1]), int(found[2])


def parse_gpu(text: str) -> Gpu:
    """A known GPU by architecture, by its short name or by a unique part of its name. ArgumentTypeError for others."""
    wanted = text.lower()
    known = {card.short.lower(): Gpu(card.name, card.capability, card.multiprocessors) for card in CARDS}
    # Architectures come before names: 90 is in RTX 3090, 4090 and 5090; and L4 is in no other short name.
    found = [gpu for gpu in GPUS.values() if str(gpu.arch) == wanted.removeprefix("sm_")]
    found = found or [gpu for short, gpu in known.items() if short == wanted]
    found = found or [gpu for gpu in known.values() if wanted in gpu.name.lower()]
    if len(found) != 1:
        raise argparse.ArgumentTypeError(
            f"expected one of {sorted(GPUS)}, {', '.join(card.short for card in CARDS)}, found {text!r}"
        )
    return found[0]


def main(options: argparse.Namespace) -> int:
    """Print the table and write the JSON file. 2 for a variant that the family does not have."""
    known = VARIANTS[options.family]
    if options.variant and options.variant not in known:
        print(f"{options.family} comes as {', '.join(known)}, found --variant {options.variant}", file=sys.stderr)
        return 2
    made = plan(
        options.family,
        options.size,
        batch=options.batch,
        dtype=options.dtype,
        variant=options.variant,
        gpu=options.gpu,
    )
    for line in table(made):
        print(line)
    if options.json:
        write_json(options.json, made.to_json())
    return 0


def table(made: ModelPlan) -> list[str]:
    """One line per launch, then the totals per part, per operator and of all launches."""
    width, first = max(len(row.kernel) for row in made.rows), CARDS[0].short
    size = f"{made.batch} x {made.size[0]}x{made.size[1]}"
    head = f"{'':>3} {'part':<11} {'operator':<20} {'kernel':<{width}} {'output':<20}"
    lines = [
        f"{made.family} ({made.variant}) {made.dtype}, {size}, launches as on {made.gpu}",
        f"{head} {'GFLOP':>8} {'MB':>7} {'weights':>7} {f'us, {first}':>8}",
    ]
    for i, row in enumerate(made.rows, start=1):
        lines.append(
            f"{i:>3} {row.part:<11} {row.op:<20} {row.kernel:<{width}} {'x'.join(map(str, row.output)):<20} "
            f"{row.flops / 1e9:>8.3f} {row.bytes / 1e6:>7.2f} {row.weight_bytes / 1e6:>7.2f} "
            f"{row.floor_us[first]:>8.2f}"
        )
    for title, key in (("part", _part), ("operator", operator_of)):
        lines += ["", _totals_line(title, None)]
        lines += [_totals_line(name, totals) for name, totals in made.grouped(key).items()]
    return [*lines, _totals_line("all", made.totals())]


def _totals_line(name: str, totals: Mapping[str, Any] | None) -> str:
    if totals is None:
        head = " ".join(f"{card.short:>8}" for card in CARDS)
        return f"{name:<24} {'launches':>8} {'GFLOP':>9} {'activation MB':>13} {'weight MB':>9}   floor us: {head}"
    floor = " ".join(f"{totals['floor_us'][card.short]:>8.1f}" for card in CARDS)
    return (
        f"{name:<24} {totals['launches']:>8} {totals['flops'] / 1e9:>9.2f} {totals['activation_bytes'] / 1e6:>13.1f} "
        f"{totals['weight_bytes'] / 1e6:>9.1f}   {'':>9} {floor}"
    )
