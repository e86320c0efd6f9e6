"""`python -m autotune show`: the source of each launch's configuration in a model, and its time.

Needs no GPU: launches are planned for the GPU that --gpu names, with its configuration file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from autotune.commands.options import GPU, add_targets, targets
from autotune.items.candidates import Candidate
from autotune.items.cost_model import LAUNCH, predict
from autotune.items.work import Target, calls_of, items, tunable
from autotune.search.store import export
from benchmarks.hardware import ceilings
from benchmarks.measure.nvml import Monitor
from tinysr_kernels.errors import InputError
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.config_file import Entries, Facts
from tinysr_kernels.launch.device import GPUS, Gpu, assume, gpu_at
from tinysr_kernels.ops import REGISTRY

SUMMARY = "Where each launch's configuration comes from and its time; exports a configuration file to contribute."


@dataclass(frozen=True)
class Row:
    """The calls of a bucket, or of an operator without kernels.

    Microseconds per call: us measured; incumbent_us measured of the configuration it replaced; model_us by the cost
    model; floor_us by the roofline.
    """

    op: str
    bucket: str
    calls: int
    source: str
    config: str
    us: float | None
    incumbent_us: float | None
    model_us: float | None
    floor_us: float


def rows(target: Target, gpu: Gpu) -> Iterator[Row]:
    """One row per bucket in order of first occurrence, then the operators without kernels."""
    found = calls_of(target, gpu)
    limits = ceilings(gpu)
    for item in items(found):
        choice = item.call.choose(gpu)
        config = " ".join(f"{k}={v}" for k, v in vars(choice.config).items())
        us = before = None
        if choice.entry is not None:
            us, before = choice.entry.time_us, choice.entry.incumbent_us
        floor = 1e6 * (limits.floor(item.cost, item.bits) + LAUNCH)
        with assume(gpu):
            candidate = Candidate(choice.config, item.call.plan(choice.config))
        model = round(1e6 * predict(item, candidate, gpu, limits), 3)
        yield Row(item.op, item.bucket, item.calls, choice.source, config, us, before, model, round(floor, 3))
    others: dict[str, list[float]] = {}
    for call in found:
        if tunable(call) is None:
            others.setdefault(call.op, []).append(limits.floor(call.cost, 16) + LAUNCH)
    for op, floors in others.items():
        floor = 1e6 * sum(floors) / len(floors)
        yield Row(op, "", len(floors), "no kernel", "", None, None, None, round(floor, 3))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_targets(parser)
    parser.add_argument(
        "--gpu", "--arch", dest="gpu", type=GPU, help="a GPU's name, or sm_90 (this machine's, else sm_90)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--export", type=Path, metavar="FILE", help="write the valid entries, to contribute")


def main(options: argparse.Namespace) -> int:
    """Print the table of each model and write the requested files."""
    present = torch.cuda.is_available()
    gpu: Gpu = options.gpu or (gpu_at(torch.device("cuda", 0)) if present else GPUS[90])
    facts = config_file.facts(gpu)
    if present and gpu == gpu_at(torch.device("cuda", 0)):
        facts = _with_driver(facts)
    file = configs.user_file(gpu.name)
    for line in state_of(file, facts):
        print(line)
    found = {}
    for target in targets(options):
        found[target.name] = list(rows(target, gpu))
        print()
        for line in table(target, found[target.name]):
            print(line)
    if options.json:
        content = {name: [vars(row) for row in some] for name, some in found.items()}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.export:
        contribute(file, options.export, facts)
        print(
            f"\nwritten to {options.export}; to contribute it, add it to tinysr_kernels/launch/configs/ under this name"
        )
    return 0


def contribute(file: Path, out: Path, facts: Facts) -> None:
    """Export the valid entries of a user's file. InputError if there are none."""
    content = export(file, facts, REGISTRY)
    if not content.get("operations"):
        raise InputError(f"{file} has no valid entry for this GPU; `python -m autotune run` creates some")
    if out.is_dir():
        out = out / file.name
    out.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def state_of(file: Path, facts: Facts) -> list[str]:
    """The state of the user's file and of the bundled one."""
    lines = [f"configurations for {facts.gpu.name}:"]
    for kind, path in (("user's", file), ("bundled", configs.BUNDLED / file.name)):
        content, obstacle = config_file.read(path)
        obstacle = obstacle or (config_file.conflicts(content, facts) if content else "")
        if obstacle:
            state = f"ignored, it {obstacle}"
        elif not content:
            state = "missing"
        else:
            found = config_file.entries(content, facts, REGISTRY)
            state = ", ".join([f"{len(found.valid)} entries", *_remarks(found)])
        lines.append(f"  {kind} {path}: {state}")
    return [*lines, f"  programmatic dependent launch: {'on' if configs.pdl(facts.gpu) else 'off'}"]


def _remarks(found: Entries) -> Iterator[str]:
    """What a user should know of a file's entries: which are ignored, and which were measured elsewhere."""
    if found.invalid:
        yield f"{found.invalid} others ignored ({configs.some(found.reasons)})"
    if found.differences:
        yield f"measured with {configs.some(found.differences)}"


def table(target: Target, found: list[Row]) -> list[str]:
    """One line per bucket, then the totals."""
    width = max(len(f"{row.op} {row.bucket}") for row in found)
    lines = [
        target.name,
        f"{'launch':<{width}} {'calls':>5} {'us':>8} {'before':>8} {'model':>8} {'floor':>7}  source, configuration",
    ]
    for row in found:
        known = (row.us, row.incumbent_us, row.model_us)
        times = " ".join(f"{v:>8.2f}" if v is not None else f"{'-':>8}" for v in known)
        source = Path(row.source).name if ".json" in row.source else row.source
        name = f"{row.op} {row.bucket}"
        lines.append(f"{name:<{width}} {row.calls:>5} {times} {row.floor_us:>7.2f}  {source} {row.config}".rstrip())
    measured = [row for row in found if row.us is not None]
    total = sum(row.calls * (row.us or 0.0) for row in measured)
    floor = sum(row.calls * row.floor_us for row in found)
    model = sum(row.calls * (row.floor_us if row.model_us is None else row.model_us) for row in found)
    lines.append(
        f"{sum(row.calls for row in found)} calls; {sum(row.calls for row in measured)} of them measured, "
        f"{total:.1f} us in total; floor of all calls {floor:.1f} us; by the cost model, which only ranks candidates, "
        f"{model:.1f} us"
    )
    return lines


def _with_driver(facts: Facts) -> Facts:
    limits = Monitor(str(torch.cuda.get_device_properties(0).uuid)).limits()
    known = {name: limits[name] for name in ("driver", "memory_mib", "power_limit_w")}
    return Facts(facts.gpu, facts.triton, facts.torch, **known)
