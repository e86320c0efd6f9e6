"""The report of a tuning run: timings before and after of each launch and of the models, as table and plot."""

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
from autotune.search.tuning import ModelTiming, Outcome
from tinysr_kernels.launch.config_file import Facts


def gained_us(race: Race) -> float:
    """Microseconds per image that the race has gained so far."""
    return race.item.calls * (race.incumbent_us - race.champion_us) if race.won else 0.0


def write(folder: Path, outcome: Outcome, facts: Facts) -> list[Path]:
    """Write report.md, report.json with every sample, and report.png where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md", folder / "report.json"]
    picture = folder / "report.png"
    if plot(picture, outcome, facts.gpu.name):
        written.append(picture)
    written[0].write_text(markdown(outcome, facts, picture.name if picture in written else ""), encoding="utf-8")
    written[1].write_text(json.dumps(to_json(outcome, facts), indent=1) + "\n", encoding="utf-8")
    return written


def markdown(outcome: Outcome, facts: Facts, picture: str = "") -> str:
    """The report as Markdown."""
    lines = [f"# {facts.gpu.name}", "", _environment(facts), ""]
    lines += [f"The new configurations are {'accepted' if outcome.accepted else 'not accepted'}: {outcome.why}.", ""]
    lines += _models(outcome.models, "before", "after")
    if outcome.pdl_models:
        lines += [f"Programmatic dependent launch is {on_off(outcome.pdl)}; the models with both settings:", ""]
        lines += _models(outcome.pdl_models, "old setting", "opposite setting")
    if picture:
        lines += [f"![before and after]({picture})", ""]
    lines += ["| launch | calls | before, us | after, us | p20 to p80 | floor, us | candidates | configuration |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|---|"]
    for race in _by_time(outcome.races):
        times = f"{_us(race.incumbent_us)} | {_us(race.champion_us)} | {_spread(race.samples.get(race.champion.key))}"
        text = config_text(race.champion) if race.won else "unchanged"
        numbers = f"{times} | {race.floor_us:.2f} | {len(race.samples)}"
        lines.append(f"| {race.item.key} | {race.item.calls} | {numbers} | {text} |")
    lines += ["", _sums(outcome)]
    return "\n".join(lines) + "\n"


def _us(time: float) -> str:
    """A time, "-" if it was not measured."""
    return f"{time:.2f}" if math.isfinite(time) else "-"


def _spread(samples: Sequence[float] | None) -> str:
    """The 20th and the 80th percentiles."""
    if not samples or len(samples) < 2:
        return "-"
    fifths = quantiles(samples, n=5, method="inclusive")
    return f"{fifths[0]:.2f} to {fifths[3]:.2f}"


def config_text(candidate: Candidate) -> str:
    """A configuration on one line."""
    return " ".join(f"{k}={v}" for k, v in candidate.fields.items())


def _environment(facts: Facts) -> str:
    gpu = facts.gpu
    return (
        f"sm_{gpu.arch}, {gpu.multiprocessors} multiprocessors, {facts.memory_mib or 'unknown'} MiB, "
        f"power limit {facts.power_limit_w or 'unknown'} W, driver {facts.driver or 'unknown'}, "
        f"Triton {facts.triton}, torch {facts.torch}. Times per call are medians of CUDA graph replays with cold "
        "inputs; models are timed from an image on the device to an image on the device."
    )


def _sums(outcome: Outcome) -> str:
    removed: Counter[str] = sum((race.removed for race in outcome.races), Counter())
    timed = sum(len(race.samples) for race in outcome.races)
    waiting = sum(len(race.uncompiled) + len(race.compiled) for race in outcome.races)
    counts = outcome.counts
    reasons = ", ".join(f"{n} {reason}" for reason, n in removed.most_common() if n)
    return (
        f"{outcome.spent:.0f} s on the device: {timed} candidates timed, {waiting} not reached within the budget; "
        f"removed: {reasons or 'none'}. {counts.get('samples', 0)} samples, {counts.get('retried', 0)} retried "
        f"because the GPU was disturbed, {counts.get('still disturbed', 0)} used although disturbed; "
        f"{counts.get('replayed', 0)} steps replayed from the log of an earlier run."
    )


def on_off(on: bool) -> str:
    """'on' or 'off'."""
    return "on" if on else "off"


def _models(models: Sequence[ModelTiming], before: str, after: str) -> list[str]:
    """A table of the models end to end, followed by an empty line; nothing if there are no models."""
    if not models:
        return []
    lines = [f"| model | {before}, us | {after}, us | gain |", "|---|---:|---:|---:|"]
    for timing in models:
        if timing.failure is not None:
            lines.append(f"| {timing.target.name} | - | - | {timing.failure.kind}: {timing.failure.detail} |")
        else:
            gain = f"{timing.before_us / timing.after_us - 1:.1%}" if timing.outcome else "within the noise"
            lines.append(f"| {timing.target.name} | {timing.before_us:.1f} | {timing.after_us:.1f} | {gain} |")
    return [*lines, ""]


def to_json(outcome: Outcome, facts: Facts) -> dict[str, Any]:
    """All results and samples, for other tools."""
    return {
        "device": facts.gpu.name,
        "accepted": outcome.accepted,
        "why": outcome.why,
        "models": _timed(outcome.models),
        "programmatic_dependent_launch": outcome.pdl,
        "models_pdl_changed": _timed(outcome.pdl_models),
        "launches": [
            {
                "op": race.item.op,
                "bucket": race.item.bucket,
                "calls": race.item.calls,
                "incumbent": race.candidates.incumbent.fields,
                "champion": race.champion.fields,
                "removed": dict(race.removed),
                "failures": [[c.fields, f.kind, f.detail] for c, f in race.failures],
                "samples_us": race.samples,
            }
            for race in outcome.races
        ],
    }


def _timed(models: Sequence[ModelTiming]) -> list[dict[str, Any]]:
    return [
        {"model": w.target.name, "before_us": w.before_us, "after_us": w.after_us, "outcome": w.outcome}
        for w in models
        if w.failure is None
    ]


def plot(path: Path, outcome: Outcome, title: str = "") -> bool:
    """Plot bars before and after, of models and launches. False if matplotlib, which is optional, is not installed."""
    races = [r for r in _by_time(outcome.races) if math.isfinite(r.incumbent_us) and math.isfinite(r.champion_us)][:30]
    models = [timing for timing in outcome.models if timing.failure is None]
    groups = {
        "per model, end to end": [(w.target.name, w.before_us, w.after_us) for w in models],
        "per launch, all calls in one image": [
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
    """Two bars per name, labeled with their lengths."""
    places = range(len(bars))
    for offset, which, label, color in ((-0.2, 1, "before", "#b0b0b0"), (0.2, 2, "after", "#2a6fbb")):
        made = axes.barh([p + offset for p in places], [bar[which] for bar in bars], 0.4, label=label, color=color)
        axes.bar_label(made, fmt="%.1f", padding=3, fontsize=7)
    axes.set_yticks(list(places), [bar[0] for bar in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.legend(fontsize=8, loc="lower right")


def _by_time(races: Sequence[Race]) -> list[Race]:
    """Largest share of the time first; without samples last."""
    return sorted(races, key=lambda race: -race.item.calls * race.incumbent_us if race.samples else 0.0)
