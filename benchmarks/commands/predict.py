"""`python -m benchmarks predict`: the time of every launch of the networks, predicted from their machine code.

Launches are planned as on each GPU and compiled ahead of time; a middle program of each is executed instruction by
instruction on its integer state, and its trace replayed through a cycle model of one SM. No GPU is needed; every
figure is predicted, none measured. docs/predicted.md says how far to trust them.

Without --family, --variant or --gpu it covers all networks on all GPUs of the model. What did not change is read from
benchmarks/results/predicted-launches.json. `--check` compares with the bars in benchmarks/results/predicted-bars.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.subjects.families import PREDICTED
from tinysr_kernels.launch import configs

SUMMARY = "The time of every launch of the networks, predicted from their machine code; needs no GPU."
FP8_FROM = 89
"""The first architecture with fp8 tensor cores."""
GPU_NAMES = {"H200": 90, "A100": 80, "RTX 4090": 89}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("--family", choices=sorted({family for family, _ in PREDICTED}), help="only this family")
    parser.add_argument("--variant", choices=[variant for _, variant in PREDICTED], help="only this variant")
    parser.add_argument("--gpu", choices=GPU_NAMES, action="append", help="only this GPU (repeatable)")
    parser.add_argument("--clock", type=float, metavar="GHZ", help="SM clock (default: as the model has it)")
    parser.add_argument("--launches", action="store_true", help="print every distinct launch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all launches to this file")
    parser.add_argument("--workers", type=int, default=2, help="parallel predictions (default 2)")
    parser.add_argument("--fresh", action="store_true", help="predict everything, ignoring benchmarks/results/")
    parser.add_argument("--keep", action="store_true", help="update benchmarks/results/ and docs/predicted.md")
    parser.add_argument("--accept", action="store_true", help="also raise the bars to what is predicted now")
    parser.add_argument("--check", action="store_true", help="fail if a prediction is above its bar")
    parser.add_argument("--calibrate", action="store_true", help="compare with figures that others published")


def main(options: argparse.Namespace) -> int:
    """Predict, print the totals, write the files. 1 if a launch cannot be predicted or is above its bar."""
    from benchmarks.predict import gate, page, store
    from benchmarks.predict.cycles.sm import NoCompiler
    from benchmarks.predict.networks import assemble

    keep = options.keep or options.accept
    if options.clock and (keep or options.check):
        print("results and bars are at the model's clock: nothing is kept or checked at another clock", file=sys.stderr)
        return 2
    os.environ[configs.USER_FOLDER] = os.devnull  # not the user's own configuration files
    configs.forget()
    if options.calibrate:
        return _calibrate(options.workers)
    planned = list(_planned(options))
    jobs = {
        job.key: job
        for *_, machine, launches in planned
        for job in (store.Job(one.program, machine) for one in launches if one.program)
    }
    stored = {} if options.fresh else store.read()
    try:
        found = store.predict_all(jobs.values(), stored, options.workers, store.write if keep else None)
        networks = [assemble(*one, found) for one in planned]
    except (NoCompiler, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    for line in table(networks, options.launches):
        print(line)
    print(f"{len(jobs)} distinct launches, {len(jobs.keys() - stored.keys())} of them predicted now")
    if options.json:
        content = [one.to_json() for one in networks]
        options.json.write_text(json.dumps(content[0] if len(content) == 1 else content, indent=1), encoding="utf-8")
    now, bars = gate.bars_of(networks), gate.read()
    if keep:
        if _everything(options):
            store.keep_only(jobs)
        gate.write({**bars, **now} if options.accept else gate.lowered(now, bars))
        page.keep([one.summary() for one in networks])
    above = gate.violations(now, bars) if options.check else []
    for text in above:
        print(text, file=sys.stderr)
    return 1 if above else 0


def _calibrate(workers: int) -> int:
    """Predict the calibration table and store it for the page. 1 if a ratio is outside its tolerance."""
    from benchmarks.predict import calibration

    rows = calibration.compare(workers=workers)
    calibration.keep(rows)
    for row in rows:
        print(f"{' | '.join(row.cells())}{'' if row.within else ': outside its tolerance'}")
    return 0 if all(row.within for row in rows) else 1


def _everything(options: argparse.Namespace) -> bool:
    """Whether the options choose all networks on all GPUs: what is stored of others is then of no use any more."""
    return not (options.family or options.variant or options.gpu)


def _planned(options: argparse.Namespace) -> Iterator[tuple[str, str, Any, Sequence[Any]]]:
    """Family, variant, machine and launches of each network on each GPU that the options choose."""
    from benchmarks.predict.cycles.machines import MACHINES, at_clock
    from benchmarks.predict.launches import network_launches

    clock = 1e9 * options.clock if options.clock else None
    for name in options.gpu or GPU_NAMES:
        machine = at_clock(MACHINES[GPU_NAMES[name]], clock)
        for family, variant in PREDICTED:
            chosen = options.family in (None, family) and options.variant in (None, variant)
            if chosen and (variant != "fp8" or machine.arch >= FP8_FROM):
                yield family, variant, machine, network_launches(family, variant, machine.arch)


def table(networks: Sequence[Any], launches: bool) -> list[str]:
    """Totals by network, part and kind of launch; launches: every distinct one as well."""
    lines = []
    for one in networks:
        summary = one.summary()
        lines += ["", f"{one.name} at {one.machine.clock / 1e9:.3f} GHz, predicted", _HEAD]
        for groups in ("parts", "kinds"):
            lines += [_row(name, totals) for name, totals in summary[groups].items()]
        lines.append(_row("all", summary["totals"]))
        lines += [f"{count} launches: {rule}" for rule, count in summary["faults"].items()]
        if launches:
            lines += _launches(one)
    return lines


_HEAD = f"{'':<44} {'launches':>8} {'floor us':>9} {'predicted':>9} {'with gaps':>9} {'ratio':>6}  limits"


def _row(name: str, totals: Mapping[str, Any]) -> str:
    limits = ", ".join(f"{limit} {share:.0%}" for limit, share in totals["limits"].items())
    floor, us, gaps = (totals[key] for key in ("floor_us", "predicted_us", "with_gaps_us"))
    ratio = f"{gaps / floor:>6.2f}" if floor else f"{'-':>6}"
    return f"{name:<44} {totals['launches']:>8} {floor:>9.1f} {us:>9.1f} {gaps:>9.1f} {ratio}  {limits}"


def _launches(network: Any) -> Iterator[str]:
    seen: dict[str, list[Any]] = {}
    for one in network.launches:
        if one.planned.program:
            seen.setdefault(one.planned.program.digest, []).append(one)
    for several in sorted(seen.values(), key=lambda found: -len(found) * found[0].us):
        one, made = several[0], several[0].prediction
        bounds = sorted(made.bounds_us.items(), key=lambda pair: -pair[1])[:3]
        yield (
            f"  {len(several):>3} x {made.us:7.2f} us, floor {one.floor_us:6.2f}  {one.kind:<40} "
            f"grid {'x'.join(map(str, one.planned.program.grid)):<12} {made.registers} registers, "
            f"{made.programs_per_sm} per SM, {made.instructions_per_warp:.0f} instructions/warp, IPC {made.ipc:.2f}, "
            f"{made.limit}: {', '.join(f'{name} {us:.1f}' for name, us in bounds)}"
        )
