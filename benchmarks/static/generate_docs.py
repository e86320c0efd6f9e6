"""`python -m benchmarks pages`: count the networks' plans anew, and write docs/kernels.md and docs/plan.md.

Both pages are made of the files in benchmarks/results/: those of `static --keep` as they are, those of the plans new.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.hardware import CARDS
from benchmarks.static.plan import plan, write_json
from benchmarks.static.static import RESULTS, Report
from benchmarks.subjects.families import SUBJECTS
from tinysr_kernels.launch.hardware import architecture

SUMMARY = "Count the plans anew; write docs/kernels.md and docs/plan.md from benchmarks/results/."
DOCS = Path(__file__).parents[2] / "docs"
PLANS = tuple((family, variant) for family, subject in SUBJECTS.items() for variant in subject.pages)

KERNELS_HEAD = """# What the kernels compile to

Made by `make tables` from the results in benchmarks/results/; do not edit.

`python -m benchmarks static` plans every operator call of the real networks as on each architecture's card and
compiles the launches ahead of time, with the signature, constants and alignment that the launch itself would have; no
GPU is needed. On all architectures: the calls of the released networks for one 128x128 image, each in the dtype that
`compile` chooses on a GPU (TinySR and the checkpoint in the package in float16, AdcSR in bfloat16). On sm_80 and sm_90
also these in the other two dtypes. On sm_90 also, in float16, the calls for 256x256 images and for batches of four, and
those of a large separable UNet and of two small networks of awkward widths. Convolutions of large images are compiled
with a GroupNorm on their way in too, which no network takes; the fp8 operators on sm_89 and later alone. **Left out**
are awkward widths on the other architectures, and the other dtypes on sm_86, 89, 100 and 120.

A report is at fault, and `make static` fails, where a kernel

- does not compile, spills registers, or needs more shared memory than a program can have;
- has a product of operands of 16 bits or fewer and no tensor-core instruction, or, on sm_90 with at least 64 rows and 4
  warps, no warpgroup instruction (wgmma);
- on sm_90 and later, where a launch may begin before the one ahead of it has ended, touches memory before it waits for
  that one.

Loads (or stores) of more than half of a tensor in pieces of less than 16 bytes a thread, although the tensor has 1 MiB
or more and rows of whole 16-byte units, are counted but not at fault yet: GroupNorm of narrow groups in one launch and
the moments that convolutions leave have no other choice as they are.

What was compiled from the same source before is not compiled again (`--fresh` does). In the tables: variants compiled;
registers a thread; warps that fit a multiprocessor at once, by registers and shared memory, of how many it can hold;
shared memory; what products run on; instructions of the PTX that load or store 16 bytes a thread. Ranges are over the
variants.
"""

PLAN_HEAD = """# What a compiled model launches

Made by `make tables` from the results in benchmarks/results/; do not edit.

Counted from the dispatch of the compiled model on meta tensors (`python -m benchmarks plan`), from the uint8 image on
the device to the enlarged uint8 image: every kernel, those of ATen between operators included. One image of 128x128,
launches chosen as on the GPU named. Activations are what a launch reads and writes of the image, scratch included,
each tensor once; weights what it reads of the network. The floor of a launch is the longer of its arithmetic and its
traffic at the card's rates, tensors below half the L2 moving at L2 speed. `tinysr_kernels/launch/hardware.py` holds the
rates with their sources: published, derived, or measured by others. **Nothing here was timed by this project.**
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options: none."""


def main(options: argparse.Namespace) -> int:
    """Write the plans' results and both pages."""
    for family, variant in PLANS:
        write_json(RESULTS / f"plan-{family}-{variant}.json", plan(family, variant=variant).to_json())
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


def pages() -> dict[Path, str]:
    """The pages' texts, by where they belong."""
    return {DOCS / "kernels.md": kernels_page(), DOCS / "plan.md": plan_page()}


def kernels_page() -> str:
    """The table of static results: in full for the newest Triton, in short for the others."""
    versions = {path.stem.removeprefix("static-triton-"): path for path in RESULTS.glob("static-triton-*.json")}
    newest_first = sorted(versions, key=lambda version: [int(n) for n in version.split(".")], reverse=True)
    text = KERNELS_HEAD
    for i, version in enumerate(newest_first):
        entries = json.loads(versions[version].read_text(encoding="utf-8"))
        reports = [Report(**entry) for entry in entries]
        faulty = [one for one in reports if one.faults]
        text += f"\n## Triton {version}\n\n{len(reports)} variants, {len(faulty)} of them at fault"
        text += "".join(f"; {count}: {fault}" for fault, count in Counter(_kinds(faulty)).items()) + ".\n"
        text += _full(reports) if i == 0 else _short(reports)
    return text


def _kinds(reports: Iterable[Report]) -> Iterable[str]:
    """Each fault without its numbers."""
    for one in reports:
        yield from (re.sub(r" \d+", "", fault) for fault in one.faults)


def _full(reports: list[Report]) -> str:
    """A table an operator, one line for each of its kernels on each architecture."""
    text = ""
    for op, of_op in _grouped(reports, lambda one: one.op).items():
        rows = [
            [kernel, f"sm_{arch}", *_figures(group)]
            for (kernel, arch), group in sorted(_grouped(of_op, lambda one: (one.kernel, one.arch)).items())
        ]
        head = "kernel arch variants registers warps shared~KiB spills products 16-byte~loads 16-byte~stores faults"
        text += f"\n### {op}\n\n{_table(head, rows)}"
    return text


def _short(reports: list[Report]) -> str:
    """One line an architecture."""
    groups = sorted(_grouped(reports, lambda one: one.arch).items())
    head = "arch variants registers warps shared~KiB spills products 16-byte~loads 16-byte~stores faults"
    return "\n" + _table(head, [[f"sm_{arch}", *_figures(group)] for arch, group in groups])


def _figures(group: list[Report]) -> list[str]:
    """What the tables say of some variants together."""
    limit = architecture(group[0].arch).warps
    products = {"wgmma" if one.wgmma else "mma" if one.tensor_core else "-" for one in group}
    return [
        str(len(group)),
        _range(one.registers for one in group),
        f"{_range(one.resident_warps for one in group)} of {limit}",
        _range(one.shared_bytes / 1024 for one in group if one.shared_bytes is not None),
        str(sum(bool(one.spill_bytes) for one in group)),
        ", ".join(sorted(products)),
        _range(one.wide_loads for one in group),
        _range(one.wide_stores for one in group),
        str(sum(bool(one.faults) for one in group)),
    ]


def _range(values: Iterable[float | None]) -> str:
    found = sorted(round(v) for v in values if v is not None)
    if not found:
        return "none"
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}-{found[-1]}"


def plan_page() -> str:
    """Totals of each plan, by part and by operator."""
    text = PLAN_HEAD
    for family, variant in PLANS:
        path = RESULTS / f"plan-{family}-{variant}.json"
        made = json.loads(path.read_text(encoding="utf-8"))
        text += f"\n## {made['family']}, {made['variant']}\n\n{made['dtype']}, launches as on {made['gpu']}.\n\n"
        for title, groups in (("part", made["parts"]), ("operator", made["operators"])):
            rows = [_plan_row(name, totals) for name, totals in groups.items()]
            head = f"{title} launches GFLOP activation~MB weight~MB " + " ".join(
                f"{card.short.replace(' ', '~')},~us" for card in CARDS
            )
            text += _table(head, [*rows, _plan_row("**all**", made["totals"])]) + "\n"
    return text.rstrip("\n") + "\n"


def _plan_row(name: str, totals: Mapping[str, Any]) -> list[str]:
    return [
        name,
        str(totals["launches"]),
        f"{totals['flops'] / 1e9:.2f}",
        f"{totals['activation_bytes'] / 1e6:.1f}",
        f"{totals['weight_bytes'] / 1e6:.1f}",
        *(f"{totals['floor_us'][card.short]:.1f}" for card in CARDS),
    ]


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _table(head: str, rows: list[list[str]]) -> str:
    """Markdown; ~ in the head stands for a space inside a title."""
    titles = [title.replace("~", " ") for title in head.split()]
    lines = [titles, ["---"] + ["---:"] * (len(titles) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
