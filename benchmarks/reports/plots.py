"""The report's plots, from result files: a roofline, the ladder of latencies, where our time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure.results import Record, Results

OURS, OTHERS, TEACHERS = "#1b7837", "#8c8c8c", "#c26a1b"
COLORS = ("#1b7837", "#2166ac", "#b2182b", "#c26a1b", "#762a83", "#00838f", "#8c8c8c", "#a6761d")


def caption(results: Results) -> str:
    """The device; for a CPU, that the results say nothing about a GPU."""
    if results.reduced:
        return "CPU, reduced sizes: says nothing about a GPU"
    return results.device


def roofline(micro: Results, ceilings: Results | None, path: Path) -> bool:
    """Our operations by intensity and rate, under the measured ceilings. Returns whether there was data."""
    points = [one for one in micro.records if one.labels.get("peer") == "ours" and one.samples_us and not one.error]
    points = [one for one in points if one.values["flops"] > 0]
    if not points:
        return False
    figure, ((axes,),) = _figure(9, 6)
    by_op: dict[str, list[Record]] = {}
    for one in points:
        by_op.setdefault(_family_of(one.labels["op"]), []).append(one)
    for i, (op, several) in enumerate(sorted(by_op.items())):
        x = [one.values["flops"] / one.values["bytes"] for one in several]
        y = [one.values["flops"] / one.values["p50_us"] / 1e6 for one in several]
        axes.scatter(x, y, s=34, color=COLORS[i % len(COLORS)], marker="os^D"[i // len(COLORS) % 4], label=op, zorder=3)
    _roofs(axes, ceilings, points)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of required traffic", ylabel="TFLOP/s")
    axes.set_title(f"Operations under the measured ceilings\n{caption(micro)}", fontsize=11)
    axes.grid(True, which="major", color="#e0e0e0", zorder=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _save(figure, path)
    return True


def _family_of(op: str) -> str:
    for suffix in ("_row_moments", "_moments", "_norm"):
        if op not in ("group_norm", "layer_norm"):
            op = op.removesuffix(suffix)
    return op


def _roofs(axes: Any, ceilings: Results | None, points: Sequence[Record]) -> None:
    copy = ceilings.find("copy") if ceilings else None
    if ceilings is None or copy is None:
        return
    intensities = [one.values["flops"] / one.values["bytes"] for one in points]
    x = np.geomspace(min(intensities) / 2, max(intensities) * 4, 200)
    bandwidth = copy.values["gbs"] / 1e3  # TB/s
    peaks = [one.values["tflops"] for one in ceilings.records if "tflops" in one.values]
    slope = x[x * bandwidth <= max(peaks, default=float("inf"))]
    axes.plot(slope, bandwidth * slope, color="black", linewidth=1.2)
    middle, text = slope[len(slope) // 3], f"copy {copy.values['gbs']:.0f} GB/s"
    axes.annotate(text, (middle, bandwidth * middle), (-6, 6), textcoords="offset points", ha="right", fontsize=8)
    for one in ceilings.records:
        if one.labels.get("what") == "GEMM" and not one.error:
            peak = one.values["tflops"]
            reach = x[x * bandwidth >= peak]
            if len(reach):
                axes.plot(reach, np.full_like(reach, peak), color="black", linewidth=1, linestyle="--")
                text = f"{one.labels['dtype']} {peak:.3g} TFLOP/s"
                axes.annotate(text, (x[-1], peak), (-4, 3), textcoords="offset points", ha="right", fontsize=8)


def ladder(e2e: Results, path: Path) -> bool:
    """Latency of one image on the device: the teachers, every peer, ours. Returns whether there was data."""
    rungs = [
        one
        for one in e2e.records
        if one.samples_us and one.labels.get("interval") == "device" and one.labels["batch"] == "1"
    ]
    if not rungs:
        return False
    rungs.sort(key=lambda one: -one.values["p50_us"])
    names = [_rung(one) for one in rungs]
    times = [one.values["p50_us"] / 1e3 for one in rungs]
    low = [t - one.values["p20_us"] / 1e3 for t, one in zip(times, rungs, strict=True)]
    high = [one.values["p80_us"] / 1e3 - t for t, one in zip(times, rungs, strict=True)]
    colors = [_color(one) for one in rungs]
    figure, ((axes,),) = _figure(10, 0.34 * len(rungs) + 1.4)
    places = range(len(rungs))
    axes.barh(places, times, color=colors, xerr=[np.maximum(low, 0), np.maximum(high, 0)], ecolor="#404040", capsize=2)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    for place, time, above in zip(places, times, high, strict=True):
        axes.annotate(
            f"{time:.3g} ms", (time + max(above, 0), place), (5, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.set_xlim(0, max(t + h for t, h in zip(times, high, strict=True)) * 1.15)
    axes.set_xlabel("ms per image on the device, median; bars from 20th to 80th percentile")
    axes.set_title(f"One image, uint8 to uint8\n{caption(e2e)}", fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _save(figure, path)
    return True


def _rung(one: Record) -> str:
    peer, dtype = one.labels["peer"], one.labels["dtype"]
    if _is_teacher(one):
        return f"{peer}, eager"
    return f"{one.labels['family']}, {dtype}: {peer}"


def _is_teacher(one: Record) -> bool:
    return one.labels["peer"] in ("TSD-SR", "OSEDiff")


def _color(one: Record) -> str:
    if _is_teacher(one):
        return TEACHERS
    return OURS if one.labels["peer"].startswith("ours") else OTHERS


def waterfall(e2e: Results, path: Path) -> bool:
    """Each family's latency part by part, in the order in which they run. Returns whether there was data."""
    rows = shares(e2e)
    if not rows:
        return False
    figure, every = _figure(9, 1.9 * len(rows) + 0.6, len(rows))
    for axes, (name, steps) in zip(every[:, 0], rows.items(), strict=True):
        begin = 0.0
        for place, ms in enumerate(steps.values()):
            axes.barh(place, ms, left=begin, color=COLORS[place % len(COLORS)])
            axes.annotate(
                f"{ms:.3g} ms", (begin + ms, place), (5, 0), textcoords="offset points", va="center", fontsize=8
            )
            begin += ms
        axes.set_yticks(range(len(steps)), list(steps), fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, max(begin, 1e-9) * 1.14)
        axes.set_title(f"{name}: {begin:.3g} ms", fontsize=10, loc="left")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    every[-1, 0].set_xlabel("ms")
    figure.suptitle(f"Where the time of one image goes, {caption(e2e)}", fontsize=11)
    _save(figure, path)
    return True


def shares(e2e: Results) -> dict[str, dict[str, float]]:
    """Family -> ms of each part alone, and the rest of the whole: image input and output, launches in between."""
    found: dict[str, dict[str, float]] = {}
    whole: dict[str, float] = {}
    for one in e2e.records:
        labels = one.labels
        if labels.get("peer") != "ours" or labels.get("batch") != "1" or not one.samples_us:
            continue
        name = f"{labels['family']} {labels['variant']}, {labels['dtype']}, {labels['size']}"
        if labels["interval"] == "device":
            whole[name] = one.values["p50_us"] / 1e3
        elif labels["interval"].startswith("part "):
            found.setdefault(name, {})[labels["interval"].removeprefix("part ")] = one.values["p50_us"] / 1e3
    for name, steps in found.items():
        rest = whole.get(name, 0.0) - sum(steps.values())
        if rest > 0:
            steps["image in and out"] = rest
    return found


def draw(files: Mapping[str, Results], folder: Path) -> list[Path]:
    """Draw all plots that the files have data for."""
    made: list[Path] = []
    for name, draws in (
        ("ladder.png", lambda path: "e2e" in files and ladder(files["e2e"], path)),
        ("waterfall.png", lambda path: "e2e" in files and waterfall(files["e2e"], path)),
        ("roofline.png", lambda path: "micro" in files and roofline(files["micro"], files.get("ceilings"), path)),
    ):
        if draws(folder / name):
            made.append(folder / name)
    return made


def _figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure and its axes [rows,1], without a display. ImportError without matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, squeeze=False)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, bbox_inches="tight")
