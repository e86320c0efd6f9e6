"""What runs on a card that nobody has tuned: on every architecture clean, and near the best that the model knows."""

from __future__ import annotations

import functools
import random
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from autotune.device.builder import Builder
from autotune.items.candidates import Candidate
from autotune.items.cost_model import predict
from autotune.items.work import Item, Target, all_items
from benchmarks.hardware import ceilings
from benchmarks.static import static
from tinysr_kernels.families import FAMILIES
from tinysr_kernels.launch.device import GPUS, assume

NETWORK = 1.25
"""Times the model's own choice that a network's heuristics may take by the model's reckoning."""
LAUNCH = 3.0
"""The same for a single launch that holds a twentieth of the network's time: of less the network feels little."""
RIVALS = 100
"""Configurations of an item at most that it is compared with, drawn at random."""
COMPILED = 8
"""Compilations of this test at most for an architecture, of those that no kept result knows."""


@dataclass(frozen=True)
class Judged:
    """An item with the heuristic's choice; seconds of all its calls by the model, of that and of the best there is."""

    item: Item
    choice: Candidate
    seconds: float
    best: float


@functools.cache
def judged(family: str, arch: int) -> list[Judged]:
    """All items of a family's first network. The library is none of the rivals: nobody knows how fast it is."""
    gpu, most = GPUS[arch], ceilings(GPUS[arch])
    found = []
    for item in all_items([Target(family)], gpu):
        with assume(gpu):
            choice = _candidate(item, item.call.heuristic(gpu))
            space = list(item.call.space(gpu))
            some = space if len(space) <= RIVALS else random.Random(0).sample(space, RIVALS)
            rivals = [_candidate(item, config) for config in some]
        assert choice is not None
        times = [predict(item, c, gpu, most) for c in (choice, *rivals) if c is choice or not (c is None or c.library)]
        found.append(Judged(item, choice, item.calls * times[0], item.calls * min(times)))
    return found


def _candidate(item: Item, config: Any) -> Candidate | None:
    try:
        return Candidate(config, item.call.plan(config))
    except ValueError:
        return None


@pytest.mark.parametrize("arch", sorted(GPUS))
@pytest.mark.parametrize("family", FAMILIES)
def test_heuristics_are_near_the_models_best(family: str, arch: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Not equal: the model knows nothing of what the static checks showed, and heuristics must not follow its every
    whim. Where they are far apart one of them is wrong."""
    found = judged(family, arch)
    seconds, best = sum(one.seconds for one in found), sum(one.best for one in found)
    worst = max(found, key=lambda one: one.seconds - one.best)
    with capsys.disabled():
        sys.stdout.write(
            f"\nsm_{arch} {family}: the model gives heuristics {1e6 * seconds:.0f} us, its own {1e6 * best:.0f} us; "
            f"furthest apart: {worst.item.key}, {1e6 * worst.seconds:.0f} and {1e6 * worst.best:.0f} us"
        )
    assert seconds <= NETWORK * best
    for one in found:
        if one.seconds >= seconds / 20:
            assert one.seconds <= LAUNCH * one.best, one.item.key


@pytest.mark.parametrize("arch", sorted(GPUS))
def test_heuristics_are_clean(arch: int) -> None:
    """Each of their launches compiles, spills nothing and fits the shared memory, by the kept results of
    `python -m benchmarks static`; of what these do not know some are compiled here."""
    pytest.importorskip("triton.backends.nvidia", reason="the compiler's own tools are needed")
    reports = static.known(static.RESULTS / f"static-triton-{static.installed(None)}.json")
    builder = Builder(GPUS[arch], 1)
    try:
        unknown = {}
        for one in (one for family in FAMILIES for one in judged(family, arch)):
            for variant in builder.variants(one.choice):
                report = reports.get(variant.digest)
                assert report is None or not report.faults, (one.item.key, report)
                if report is None:
                    unknown[variant.digest] = one
        for one in list(unknown.values())[:COMPILED]:
            assert builder.build([one.choice])[0].faults == (), one.item.key
    finally:
        builder.stop()


@pytest.mark.parametrize("family", FAMILIES)
def test_heuristics_follow_the_architecture(family: str) -> None:
    """What fits Hopper's 227 KB of shared memory does not fit Ada's 99 KB: the choices are not the same everywhere."""
    choices = {arch: [one.choice.fields for one in judged(family, arch)] for arch in GPUS}
    assert len({str(some) for some in choices.values()}) > 1
