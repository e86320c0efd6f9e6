"""The heuristics' choices: free of faults on every architecture, and close to the cost model's best candidate."""

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
from benchmarks.subjects.families import SUBJECTS
from tinysr_kernels.launch.device import GPUS, assume

NETWORK = 1.25
"""Allowed ratio of a network's predicted time with the heuristics to that with the cost model's best candidates."""
LAUNCH = 3.0
"""The same for a single launch with at least a twentieth of the network's time."""
RIVALS = 100
"""Maximum number of configurations per item to compare with, chosen at random."""
COMPILED = 8
"""Maximum number of compilations per architecture, of launches without a stored result."""


@dataclass(frozen=True)
class Comparison:
    """An item with the heuristic's choice; predicted seconds of its calls with that, and with the best candidate."""

    item: Item
    choice: Candidate
    seconds: float
    best: float


@functools.cache
def compared(family: str, arch: int) -> list[Comparison]:
    """All items of a family's first network. Library candidates are excluded: the cost model cannot predict them."""
    gpu, limits = GPUS[arch], ceilings(GPUS[arch])
    found = []
    for item in all_items([Target(family)], gpu):
        with assume(gpu):
            choice = _candidate(item, item.call.heuristic(gpu))
            space = list(item.call.space(gpu))
            some = space if len(space) <= RIVALS else random.Random(0).sample(space, RIVALS)
            rivals = [_candidate(item, config) for config in some]
        assert choice is not None
        times = [
            predict(item, c, gpu, limits) for c in (choice, *rivals) if c is choice or not (c is None or c.library)
        ]
        found.append(Comparison(item, choice, item.calls * times[0], item.calls * min(times)))
    return found


def _candidate(item: Item, config: Any) -> Candidate | None:
    try:
        return Candidate(config, item.call.plan(config))
    except ValueError:
        return None


@pytest.mark.parametrize("arch", sorted(GPUS))
@pytest.mark.parametrize("family", SUBJECTS)
def test_heuristics_are_close_to_the_cost_models_best(
    family: str, arch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not equal: the cost model ignores what the static checks found, and heuristics need not follow it in detail.

    Where they are far apart, one of them is wrong.
    """
    found = compared(family, arch)
    seconds, best = sum(one.seconds for one in found), sum(one.best for one in found)
    worst = max(found, key=lambda one: one.seconds - one.best)
    with capsys.disabled():
        sys.stdout.write(
            f"\nsm_{arch} {family}: predicted {1e6 * seconds:.0f} us with heuristics, {1e6 * best:.0f} us at best; "
            f"furthest apart: {worst.item.key}, {1e6 * worst.seconds:.0f} and {1e6 * worst.best:.0f} us"
        )
    assert seconds <= NETWORK * best
    for one in found:
        if one.seconds >= seconds / 20:
            assert one.seconds <= LAUNCH * one.best, one.item.key


@pytest.mark.parametrize("arch", sorted(GPUS))
def test_heuristics_have_no_faults(arch: int) -> None:
    """Each launch compiles, does not spill and fits the shared memory, by the stored results of
    `python -m benchmarks static`; some of the launches without a stored result are compiled here."""
    pytest.importorskip("triton.backends.nvidia", reason="the compiler's own tools are needed")
    reports = static.read_reports(static.RESULTS / f"static-triton-{static.installed(None)}.json")
    builder = Builder(GPUS[arch], 1)
    try:
        unknown = {}
        for one in (one for family in SUBJECTS for one in compared(family, arch)):
            for variant in builder.variants(one.choice):
                report = reports.get(variant.digest)
                assert report is None or not report.faults, (one.item.key, report)
                if report is None:
                    unknown[variant.digest] = one
        for one in list(unknown.values())[:COMPILED]:
            assert builder.build([one.choice])[0].faults == (), one.item.key
    finally:
        builder.stop()


@pytest.mark.parametrize("family", SUBJECTS)
def test_heuristics_depend_on_the_architecture(family: str) -> None:
    """Blocks that fit Hopper's 227 KB of shared memory do not fit Ada's 99 KB, so the choices differ."""
    choices = {arch: [one.choice.fields for one in compared(family, arch)] for arch in GPUS}
    assert len({str(some) for some in choices.values()}) > 1
