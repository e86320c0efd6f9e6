"""The gate: no network, kind of launch or rule for fast code is worse than when a person last accepted it.

benchmarks/results/predicted-bars.json has the predicted microseconds of each network and of each kind of launch in it,
and how many launches break each rule (`PredictedLaunch.faults`). `predict --check` fails above a bar by more than the
slack; `predict --keep` lowers bars and adds new ones; only `predict --accept` raises them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.predict.networks import NetworkPrediction
from benchmarks.predict.store import LARGEST_FILE, RESULTS
from tinysr_kernels.launch.json_file import BadFile, read_json

BARS = RESULTS / "predicted-bars.json"
SLACK, SLACK_US = 0.02, 0.5
"""What a time may exceed its bar by: the larger of this part of it and these microseconds."""
Bars = dict[str, dict[str, float]]
"""Per network and GPU: "total", "kind OP: KERNEL" and "rule RULE"."""


def bars_of(networks: Iterable[NetworkPrediction]) -> Bars:
    """What the model says now."""
    made: Bars = {}
    for one in networks:
        summary = one.summary()
        bars = {"total": summary["totals"]["with_gaps_us"]}
        bars |= {f"kind {kind}": totals["with_gaps_us"] for kind, totals in summary["kinds"].items()}
        bars |= {f"rule {rule}": count for rule, count in summary["faults"].items()}
        made[one.name] = bars
    return made


def violations(now: Bars, bars: Bars) -> list[str]:
    """Every figure above its bar, as text. A kind without a bar is new and counts in its network's total alone."""
    found = []
    for name, figures in now.items():
        held = bars.get(name)
        if held is None:
            found.append(f"{name}: has no bars; `python -m benchmarks predict --keep` adds them")
            continue
        for what, figure in figures.items():
            rule = what.startswith("rule ")
            bar = held.get(what, 0 if rule else figure)
            if figure > (bar if rule else bar + max(SLACK * bar, SLACK_US)):
                unit = "launches" if rule else "us predicted"
                found.append(f"{name}, {what}: {figure:g} {unit}, the bar is {bar:g}")
    return found


def lowered(now: Bars, bars: Bars) -> Bars:
    """The bars after these predictions: the lower of both, new ones added, those of kinds that are gone removed."""
    return {**bars, **{name: _lower(figures, bars.get(name)) for name, figures in now.items()}}


def _lower(now: Mapping[str, float], bars: Mapping[str, float] | None) -> dict[str, float]:
    if bars is None:
        return dict(now)
    rules = {what: 0.0 for what in now if what.startswith("rule ") and what not in bars}
    return {what: min(figure, bars.get(what, figure)) for what, figure in now.items()} | rules


def read(path: Path = BARS) -> Bars:
    """The bars; none if there is no file. BadFile for a file of another form."""
    try:
        content = read_json(path, LARGEST_FILE)
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict) or not all(isinstance(bars, dict) for bars in content.values()):
        raise BadFile(f"{path} holds no bars")
    return content


def write(bars: Bars, path: Path = BARS) -> None:
    """One bar per line."""
    path.write_text(json.dumps(bars, indent=1, sort_keys=True) + "\n", encoding="utf-8")
