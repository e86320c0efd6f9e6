"""The report of a run: before and after, a table and a plot for each launch and for the models end to end."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotune.candidates import Candidate
from autotune.search import Race
from autotune.tuning import Outcome
from tinysr_kernels.launch.config_file import Facts


def gained_us(race: Race) -> float:
    """Microseconds of an image that the race has gained so far."""
    return race.item.calls * (race.incumbent_us - race.champion_us) if race.won else 0.0


def write(folder: Path, outcome: Outcome, facts: Facts) -> list[Path]:
    """Write report.md, report.json with every reading, and report.png where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "report.md", folder / "report.json"]
    picture = folder / "report.png"
    if plot(picture, outcome):
        written.append(picture)
    written[0].write_text(markdown(outcome, facts, picture.name if picture in written else ""), encoding="utf-8")
    written[1].write_text(json.dumps(readings(outcome, facts), indent=1) + "\n", encoding="utf-8")
    return written


def markdown(outcome: Outcome, facts: Facts, picture: str = "") -> str:
    """The report as text."""
    lines = [f"# {facts.gpu.name}", "", _environment(facts), ""]
    lines += [f"The new configurations are {'kept' if outcome.kept else 'not kept'}: {outcome.why}.", ""]
    if outcome.wholes:
        lines += ["| model | before, us | after, us | gain |", "|---|---:|---:|---:|"]
        for whole in outcome.wholes:
            if whole.failure is not None:
                lines.append(f"| {whole.target.name} | - | - | {whole.failure.kind}: {whole.failure.detail} |")
            else:
                gain = f"{whole.before_us / whole.after_us - 1:.1%}" if whole.outcome else "within the noise"
                lines.append(f"| {whole.target.name} | {whole.before_us:.1f} | {whole.after_us:.1f} | {gain} |")
        lines.append("")
    if picture:
        lines += [f"![before and after]({picture})", ""]
    lines += ["| launch | calls | before, us | after, us | floor, us | candidates | configuration |"]
    lines += ["|---|---:|---:|---:|---:|---:|---|"]
    for race in _by_time(outcome.races):
        numbers = f"{race.incumbent_us:.2f} | {race.champion_us:.2f} | {race.floor_us:.2f} | {len(race.readings)}"
        text = named(race.champion) if race.won else "as it was"
        lines.append(f"| {race.item.key} | {race.item.calls} | {numbers} | {text} |")
    lines += ["", _sums(outcome)]
    return "\n".join(lines) + "\n"


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


def readings(outcome: Outcome, facts: Facts) -> dict[str, Any]:
    """Everything that was read, for other tools."""
    return {
        "device": facts.gpu.name,
        "kept": outcome.kept,
        "why": outcome.why,
        "models": [
            {"model": w.target.name, "before_us": w.before_us, "after_us": w.after_us, "outcome": w.outcome}
            for w in outcome.wholes
            if w.failure is None
        ],
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


def plot(path: Path, outcome: Outcome) -> bool:
    """Bars before and after; whether it was drawn (matplotlib is optional)."""
    races = [race for race in _by_time(outcome.races) if race.readings][:30]
    with contextlib.suppress(ImportError):
        from matplotlib.figure import Figure  # no pyplot: no display and no state

        names = [race.item.key for race in races] + [whole.target.name for whole in outcome.wholes]
        before = [race.item.calls * race.incumbent_us for race in races] + [w.before_us for w in outcome.wholes]
        after = [race.item.calls * race.champion_us for race in races] + [w.after_us for w in outcome.wholes]
        figure = Figure(figsize=(10, 1.5 + 0.32 * len(names)), layout="constrained")
        axes = figure.subplots()
        places = range(len(names))
        axes.barh([p - 0.2 for p in places], before, 0.4, label="before", color="#b0b0b0")
        axes.barh([p + 0.2 for p in places], after, 0.4, label="after", color="#2a6fbb")
        axes.set_yticks(list(places), names, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("microseconds an image, all calls of a launch together")
        axes.set_xscale("log")
        axes.legend()
        figure.savefig(path, dpi=120)
        return True
    return False


def _by_time(races: Sequence[Race]) -> list[Race]:
    """Those that hold most of the time first; those that were never read last."""
    return sorted(races, key=lambda race: -race.item.calls * race.incumbent_us if race.readings else 0.0)
