"""The proof's results: proves every family, writes docs/compression/masks-proof.json and the figures beside it."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from model.compress.masks.decide import Mask
from model.compress.masks.learner import Schedule
from model.compress.masks.objectives import FAMILIES, GROUP, KEEP, LAYERS, draw
from model.compress.masks.proof import BAR, SCHEDULE, Outcome, Proof, prove, train


def run(out: Path, seeds: Sequence[int], say: Callable[[str], None], schedule: Schedule = SCHEDULE) -> bool:
    """Prove every family, write masks-proof.json and the figures to `out`; whether the learner meets its bar."""
    proofs = []
    for family in FAMILIES:
        proofs.append(prove(family, seeds, schedule=schedule))
        say(f"{family}: {proofs[-1].unreachable} of {len(seeds)} out of reach of fixed groups")
        for method, outcome in proofs[-1].outcomes.items():
            say(f"  {outcome.within(proofs[-1].best):5.0%} among the best 1 %, {describe(outcome)}  {method}")
    out.mkdir(parents=True, exist_ok=True)
    write(out / "masks-proof.json", results(proofs, schedule))
    history = train("learned", draw("lopsided", seeds), seeds, schedule)[1]
    try:
        from model.compress.masks import figures
    except ImportError as error:
        say(f"no figures: {error} (pip install matplotlib)")
    else:
        figures.ranks(proofs, out / "masks-ranks.png")
        figures.kept(proofs, out / "masks-kept.png")
        figures.training(history.run(0), out / "masks-training.png")
    met = all(proof.outcomes["learned"].within(proof.best) >= BAR for proof in proofs)
    say(f"{out / 'masks-proof.json'}: the threshold of {BAR:.0%} is {'met' if met else 'missed'}")
    return met


def describe(outcome: Outcome) -> str:
    """Median and worst rank."""
    return f"median rank {statistics.median(outcome.ranks):g}, worst {max(outcome.ranks)}"


def results(proofs: Sequence[Proof], schedule: Schedule = SCHEDULE) -> dict[str, Any]:
    """What is written: settings and, per family and method, the share within the best 1 %, ranks and masks."""
    return {
        "blocks": LAYERS,
        "kept": KEEP,
        "group": GROUP,
        "bar": BAR,
        "schedule": asdict(schedule),
        "torch": torch.__version__,
        "families": {
            proof.family: {
                "seeds": [proof.seeds[0], proof.seeds[-1]],
                "best": proof.best,
                "out_of_reach_of_fixed_groups": proof.unreachable,
                "optimal": [_text(mask) for mask in proof.optimal],
                "methods": {
                    method: {
                        "within": outcome.within(proof.best),
                        "median": statistics.median(outcome.ranks),
                        "ranks": outcome.ranks,
                        "masks": [_text(mask) for mask in outcome.masks],
                    }
                    for method, outcome in proof.outcomes.items()
                },
            }
            for proof in proofs
        },
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON, one list per line, atomically."""
    text = json.dumps(content, indent=1)
    beside = path.with_name(path.name + ".part")
    beside.write_text(_flat(text) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _flat(text: str) -> str:
    """Lists of plain values on one line each."""
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        part = line.strip()
        if inside:
            lines[-1] += part if part.startswith("]") else f"{part} "
            inside = not part.startswith("]")
            continue
        lines.append(line)
        inside = line.endswith("[")
    return "\n".join(lines).replace(" ]", "]")


def _text(mask: Mask) -> str:
    """A mask as zeros and ones."""
    return "".join(str(int(kept)) for kept in mask)
