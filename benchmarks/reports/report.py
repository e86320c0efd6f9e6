"""`python -m benchmarks report DIR`: Markdown tables and plots from the result files in a folder.

Everything is read from the files, including device, versions, driver, commit and throttling.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.measure.results import Record, Results, read
from benchmarks.reports.plots import draw, shares
from tinysr_kernels.launch.json_file import BadFile, open_regular

SUMMARY = "Markdown tables, a roofline, a ladder and a waterfall from result files."
FACTS = ("torch", "triton", "driver", "cuda", "cudnn", "python", "processor", "threads", "commit")
Rows = list[list[str]]
INCOMPLETE = (LookupError, ArithmeticError, ValueError)
"""What a section raises for a file of the right form whose records lack labels or values, or have absurd ones."""


def load(folder: Path) -> dict[str, Results]:
    """The result files in a folder by their commands; others are ignored, and damaged ones named on stderr."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            with open_regular(path) as file:
                if b'"schema"' not in file.read(200):
                    continue
            results = read(path)
        except (BadFile, OSError) as error:
            print(f"ignored: {path.name!r}: {error}", file=sys.stderr)
        else:
            found[results.command] = results
    return found


def report(files: dict[str, Results], plots: Iterable[Path] = ()) -> str:
    """The report as Markdown. A file that lacks what its section needs is said to do so in its place."""
    text = "# Benchmark report\n\nMade by `python -m benchmarks report` from result files; do not edit.\n"
    names = {path.name for path in plots}
    for command, section in SECTIONS.items():
        if command in files:
            results = files[command]
            try:
                body = section(results)
            except INCOMPLETE as error:
                body = f"The file lacks what this section shows: {str(error)[:200]}\n"
            text += f"\n## {command}\n\n{_head(results)}\n{body}"
            text += "".join(f"\n![{name}]({name})\n" for name in PLOTS.get(command, ()) if name in names)
    return text


def _head(results: Results) -> str:
    facts = results.environment
    known = ", ".join(f"{name} {facts[name]}" for name in FACTS if name in facts)
    device = "**CPU, reduced sizes: says nothing about a GPU.**" if results.reduced else f"**{results.device}.**"
    text = f"{device} {known}. Started {results.started}"
    text += "" if results.complete else "; **not complete**"
    disturbed = sum(bool(why) for one in results.records for why in one.disturbed)
    reasons = sorted({why for one in results.records for why in one.disturbed if why})
    if disturbed:
        text += f". {disturbed} samples are marked as disturbed: {', '.join(reasons)[:200]}"
    readings = [reading for one in results.records for reading in one.readings if reading.clock_mhz]
    if readings:
        clocks, power = [r.clock_mhz for r in readings], [r.power_w for r in readings]
        heat = [r.temperature_c for r in readings]
        text += (
            f". Clock {min(clocks)} to {max(clocks)} MHz, power {min(power):.0f} to {max(power):.0f} W, "
            f"{min(heat)} to {max(heat)} C"
        )
    return text + ".\n" + "".join(f"\n- {note}" for note in results.notes) + ("\n" if results.notes else "")


def table(head: list[str], rows: Rows) -> str:
    """A Markdown table, with a left-aligned first column."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _failures(records: Iterable[Record]) -> str:
    failed = [one for one in records if one.error]
    return "".join(f"\n- {one.key}: {one.error}" for one in failed) + ("\n" if failed else "")


def _ceilings(results: Results) -> str:
    rows = []
    for one in results.records:
        if not one.error:
            v = one.values
            rate = f"{v['gbs']:.0f} GB/s" if "gbs" in v else f"{v['tflops']:.3g} TFLOP/s" if "tflops" in v else ""
            rows.append([one.key, one.labels.get("size", ""), f"{v['p50_us']:.2f}", rate])
    return table(["ceiling", "size", "us", "rate"], rows) + _failures(results.records)


def _correctness(results: Results) -> str:
    rows = [
        [one.key, *(f"{one.values.get(name, 0):.0f}" for name in ("passed", "failed", "skipped")), one.error or "ok"]
        for one in results.records
    ]
    return table(["group", "passed", "failed", "skipped", "outcome"], rows)


def _e2e(results: Results) -> str:
    ours = {_place(one): one.values["p50_us"] for one in _timed(results) if one.labels["peer"] == "ours"}
    rows = []
    for one in _timed(results):
        if one.labels["interval"].startswith("part "):
            continue
        v = one.values
        beside = v.get("beside_p50_us") or ours.get(_place(one))
        rows.append(
            [
                f"{one.labels['family']} {one.labels['variant']}, {one.labels['peer']}",
                one.labels["dtype"],
                f"{one.labels['batch']} x {one.labels['size']}",
                one.labels["interval"],
                f"{v['p50_us'] / 1e3:.3f}",
                f"{v['p20_us'] / 1e3:.3f}-{v['p80_us'] / 1e3:.3f}",
                f"{v['p50_us'] / beside:.2f}" if beside else "",
                f"{v['peak_mib']:.0f}" if v.get("peak_mib") else "",
            ]
        )
    head = ["network and peer", "dtype", "images", "interval", "p50 ms", "p20-p80", "times ours", "peak MiB"]
    parts = [[name, *(f"{part} {ms:.3f}" for part, ms in steps.items())] for name, steps in shares(results).items()]
    width = max((len(row) for row in parts), default=1)
    text = table(head, rows)
    if parts:
        filled = [row + [""] * (width - len(row)) for row in parts]
        text += "\nParts of one image, ms, each by itself:\n\n" + table(["network", *[" "] * (width - 1)], filled)
    return text + _failures(results.records)


def _timed(results: Results) -> list[Record]:
    return [one for one in results.records if one.samples_us and not one.error]


def _place(one: Record) -> tuple[str, ...]:
    return tuple(one.labels[name] for name in ("family", "variant", "size", "batch", "interval"))


def _micro(results: Results) -> str:
    calls: dict[tuple[str, ...], dict[str, Record]] = {}
    for one in _timed(results):
        calls.setdefault(tuple(one.labels[n] for n in ("op", "dtype", "shapes")), {})[one.labels["peer"]] = one
    rows = []
    for (op, dtype, shapes), peers in calls.items():
        ours = peers.get("ours")
        times = [
            f"{peers[p].values['p50_us']:.2f}" if p in peers else "" for p in ("ours", "eager", "compile", "library")
        ]
        values = ours.values if ours else {}
        rates = [f"{values[k]:.{n}f}" if k in values else "" for k, n in (("tflops", 2), ("gbs", 0))]
        share = f"{values['of_floor']:.0%}" if "of_floor" in values else ""
        rows.append([f"{op} `{shapes[:100]}`", dtype, *times, *rates, share])
    head = ["call", "dtype", "ours us", "eager us", "compile us", "library us", "TFLOP/s", "GB/s", "of floor"]
    return table(head, rows) + _failures(results.records)


def _quality(results: Results) -> str:
    rows = [
        [
            one.key,
            f"{one.values['psnr']:.3f}",
            f"{one.values['ssim']:.4f}",
            f"{one.values['bicubic_psnr']:.3f}",
            f"{one.values['bicubic_ssim']:.4f}",
            f"{one.values['psnr_to_float32']:.2f}",
        ]
        for one in results.records
        if not one.error and one.labels.get("photograph") == "mean"
    ]
    head = ["dtype and backend", "PSNR", "SSIM", "bicubic PSNR", "bicubic SSIM", "PSNR to float32"]
    return table(head, rows) + _failures(results.records)


def _cpu(results: Results) -> str:
    rows = []
    for one in results.records:
        name, _, what = one.key.rpartition(": ")
        if what != "speedup":
            continue
        times = [
            f"{found.values['p50_us'] / 1e3:.0f}" for w in ("eager", "ours") if (found := results.find(f"{name}: {w}"))
        ]
        v = one.values
        rows.append([name, *times, f"{v['speedup']:.2f}", f"{v['bar']:.2f}", f"{v['difference']:.1e}"])
    return table(["network", "eager ms", "ours ms", "speedup", "at least", "outputs differ by"], rows)


def _soak(results: Results) -> str:
    names = ("images", "different", "held_mib", "seconds")
    rows = [[one.key, *(f"{one.values[name]:.0f}" for name in names)] for one in results.records if not one.error]
    return table(["round", "images", "different", "MiB held", "seconds"], rows) + _failures(results.records)


SECTIONS: dict[str, Callable[[Results], str]] = {
    "ceilings": _ceilings,
    "correctness": _correctness,
    "e2e": _e2e,
    "micro": _micro,
    "quality": _quality,
    "soak": _soak,
    "cpu": _cpu,
}
PLOTS = {"e2e": ("ladder.png", "waterfall.png"), "micro": ("roofline.png",)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="where the result files are")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the report (the same folder)")


def main(options: argparse.Namespace) -> int:
    """Write report.md and the plots. 2 where there is no result file."""
    files = load(options.folder)
    if not files:
        print(f"{options.folder} holds no result file", file=sys.stderr)
        return 2
    out = options.out or options.folder
    out.mkdir(parents=True, exist_ok=True)
    plots: list[Path] = []
    try:
        plots = draw(files, out)
    except (ImportError, *INCOMPLETE) as error:
        print(f"no plots: {str(error)[:200]}", file=sys.stderr)
    (out / "report.md").write_text(report(files, plots), encoding="utf-8")
    for path in (out / "report.md", *plots):
        print(path)
    return 0
