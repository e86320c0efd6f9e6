"""The report of a run: before and after, a table and a plot for each launch and for the models end to end."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

from autotune.items.candidates import Candidate
from autotune.search.search import Race
from autotune.search.tuning import Outcome, Whole
from tinysr_kernels.launch.config_file import Facts


def gained_us(race: Race) -> float:
    """Microseconds of an image that the race has gained so far."""
    return race.item.calls * (race.incumbent_us - race.champion_us) if race.won else 0.0


def write(folder: Path, outcome: Outcome, facts: Facts) -> list[Path]:
    """Write report.md, report.json with every reading, and report.png where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md", folder / "report.json"]
    picture = folder / "report.png"
    if plot(picture, outcome, facts.gpu.name):
        written.append(picture)
    written[0].write_text(markdown(outcome, facts, picture.name if picture in written else ""), encoding="utf-8")
    written[1].write_text(json.dumps(readings(outcome, facts), indent=1) + "\n", encoding="utf-8")
    return written


def markdown(outcome: Outcome, facts: Facts, picture: str = "") -> str:
    """The report as text."""
    lines = [f"# {facts.gpu.name}", "", _environment(facts), ""]
    lines += [f"The new configurations are {'kept' if outcome.kept else 'not kept'}: {outcome.why}.", ""]
    lines += _models(outcome.wholes, "before", "after")
    if outcome.pdl_wholes:
        lines += [f"Programmatic dependent launch is {state(outcome.pdl)}; the models as it was, and changed:", ""]
        lines += _models(outcome.pdl_wholes, "as it was", "changed")
    if picture:
        lines += [f"![before and after]({picture})", ""]
    lines += ["| launch | calls | before, us | after, us | p20 to p80 | floor, us | candidates | configuration |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---|"]
    for race in _by_time(outcome.races):
        times = f"{_us(race.incumbent_us)} | {_us(race.champion_us)} | {_spread(race.readings.get(race.champion.key))}"
        text = named(race.champion) if race.won else "as it was"
        numbers = f"{times} | {race.floor_us:.2f} | {len(race.readings)}"
        lines.append(f"| {race.item.key} | {race.item.calls} | {numbers} | {text} |")
    lines += ["", _sums(outcome)]
    return "\n".join(lines) + "\n"


def _us(time: float) -> str:
    """A time, or that it was never read."""
    return f"{time:.2f}" if math.isfinite(time) else "-"


def _spread(readings: Sequence[float] | None) -> str:
    """The 20th and the 80th percentile."""
    if not readings or len(readings) < 2:
        return "-"
    fifths = quantiles(readings, n=5, method="inclusive")
    return f"{fifths[0]:.2f} to {fifths[3]:.2f}"


def named(candidate: Candidate) -> str:
    """A configuration in a line."""
    return " ".join(f"{k}={v}" for k, v in candidate.fields.items())


def _environment(facts: Facts) -> str:
    gpu = facts.gpu
    return (
        f"sm_{gpu.arch}, {gpu.multiprocessors} multiprocessors, {facts.memory_mib or 'unknown'} MiB, "
        f"power limit {facts.power_limit_w or 'unknown'} W, driver {facts.driver or 'unknown'}, "
        f"Triton {facts.triton}, torch {facts.torch}. Times of a call are medians of CUDA graph replays with inputs "
        "past the L2; models from an image on the device to an image on the device."
    )


def _sums(outcome: Outcome) -> str:
    removed: Counter[str] = sum((race.removed for race in outcome.races), Counter())
    raced = sum(len(race.readings) for race in outcome.races)
    waiting = sum(len(race.raw) + len(race.rivals) for race in outcome.races)
    counts = outcome.counts
    reasons = ", ".join(f"{n} {reason}" for reason, n in removed.most_common() if n)
    return (
        f"{outcome.spent:.0f} s on the device: {raced} candidates timed, {waiting} not reached within the budget; "
        f"removed: {reasons or 'none'}. {counts.get('samples', 0)} readings, {counts.get('retaken', 0)} taken again "
        f"because the GPU was disturbed, {counts.get('still disturbed', 0)} kept although it still was; "
        f"{counts.get('recalled', 0)} steps recalled from an earlier run."
    )


def state(on: bool) -> str:
    """on or off."""
    return "on" if on else "off"


def _models(wholes: Sequence[Whole], before: str, after: str) -> list[str]:
    """A table of the models end to end, and an empty line; nothing without models."""
    if not wholes:
        return []
    lines = [f"| model | {before}, us | {after}, us | gain |", "|---|---:|---:|---:|"]
    for whole in wholes:
        if whole.failure is not None:
            lines.append(f"| {whole.target.name} | - | - | {whole.failure.kind}: {whole.failure.detail} |")
        else:
            gain = f"{whole.before_us / whole.after_us - 1:.1%}" if whole.outcome else "within the noise"
            lines.append(f"| {whole.target.name} | {whole.before_us:.1f} | {whole.after_us:.1f} | {gain} |")
    return [*lines, ""]


def readings(outcome: Outcome, facts: Facts) -> dict[str, Any]:
    """Everything that was read, for other tools."""
    return {
        "device": facts.gpu.name,
        "kept": outcome.kept,
        "why": outcome.why,
        "models": _timed(outcome.wholes),
        "programmatic_dependent_launch": outcome.pdl,
        "models_pdl_changed": _timed(outcome.pdl_wholes),
        "launches": [
            {
                "op": race.item.op,
                "bucket": race.item.bucket,
                "calls": race.item.calls,
                "incumbent": race.candidates.incumbent.fields,
                "champion": race.champion.fields,
                "removed": dict(race.removed),
                "failures": [[c.fields, f.kind, f.detail] for c, f in race.failures],
                "readings_us": race.readings,
            }
            for race in outcome.races
        ],
    }


def _timed(wholes: Sequence[Whole]) -> list[dict[str, Any]]:
    return [
        {"model": w.target.name, "before_us": w.before_us, "after_us": w.after_us, "outcome": w.outcome}
        for w in wholes
        if w.failure is None
    ]


def plot(path: Path, outcome: Outcome, title: str = "") -> bool:
    """Bars before and after, the models end to end and the launches; whether it was drawn (matplotlib is optional)."""
    races = [r for r in _by_time(outcome.races) if math.isfinite(r.incumbent_us) and math.isfinite(r.champion_us)][:30]
    wholes = [whole for whole in outcome.wholes if whole.failure is None]
    groups = {
        "a model end to end": [(w.target.name, w.before_us, w.after_us) for w in wholes],
        "all calls of a launch in an image": [
            (r.item.key, r.item.calls * r.incumbent_us, r.item.calls * r.champion_us) for r in races
        ],
    }
    drawn = {name: bars for name, bars in groups.items() if bars}
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure  # no pyplot: no display and no state

        heights = [1.0 + 0.42 * len(bars) for bars in drawn.values()]
        figure = Figure(figsize=(10, 0.6 + sum(heights)), layout="constrained")
        figure.suptitle(title)
        panels = figure.subplots(len(drawn), squeeze=False, height_ratios=heights)[:, 0] if drawn else ()
        for axes, (name, bars) in zip(panels, drawn.items(), strict=True):
            _bars(axes, bars)
            axes.set_xlabel(f"microseconds, {name}")
        figure.savefig(path, dpi=120)
        return True
    return False


def _bars(axes: Any, bars: Sequence[tuple[str, float, float]]) -> None:
    """Two bars for each name, with their lengths written behind them."""
    places = range(len(bars))
    for offset, which, label, color in ((-0.2, 1, "before", "#b0b0b0"), (0.2, 2, "after", "#2a6fbb")):
        made = axes.barh([p + offset for p in places], [bar[which] for bar in bars], 0.4, label=label, color=color)
        axes.bar_label(made, fmt="%.1f", padding=3, fontsize=7)
    axes.set_yticks(list(places), [bar[0] for bar in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(fontsize=8, loc="lower right")


def _by_time(races: Sequence[Race]) -> list[Race]:
    """Those that hold most of the time first; those that were never read last."""
    return sorted(races, key=lambda race: -race.item.calls * race.incumbent_us if race.readings else 0.0)
