"""How long a candidate should take, from its bytes, its waves and its occupancy. It orders what is then measured.

A call moves its bytes through memory once. Programs that each compute r of R results of K terms share what they load
with nobody: a square tile loads 2 sqrt(r) K values, hence 2 K sqrt(R G) values for G programs in all, through the L2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from autotune.candidates import Candidate
from autotune.work import Item
from benchmarks.limits import Ceilings, nearest_known
from benchmarks.occupancy import resident_warps
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch

LAUNCH = 1e-6
"""Seconds that each dependent node of a graph takes (PERFORMANCE: 0.6 to 1.0 us)."""
LIBRARY = 0.75
"""Part of the ceiling that a library's kernel is expected to reach; only the order depends on it."""
BUSY_WARPS = 16
"""Warps in flight on a multiprocessor, times pipeline stages, that hide the way to memory."""
REGISTERS = 64
"""A thread, where the code is not compiled yet."""


@dataclass(frozen=True)
class Built:
    """What ahead-of-time compilation found: registers a thread and bytes of shared memory of each launch, and faults.

    Empty resources: not known (a library's kernels).
    """

    resources: tuple[tuple[int, int], ...] = ()
    faults: tuple[str, ...] = ()


def predict(item: Item, candidate: Candidate, gpu: Gpu, most: Ceilings, built: Built | None = None) -> float:
    """Seconds of a call."""
    plan = candidate.plan
    overhead = LAUNCH * plan.kernels
    own = [launch for launch in plan.launches if isinstance(launch, Launch)]
    floor = most.floor(item.cost, item.single)
    if not own:
        return overhead + floor / LIBRARY
    resources = built.resources if built is not None and len(built.resources) == len(own) else [None] * len(own)
    main, needs = max(zip(own, resources, strict=True), key=lambda pair: math.prod(pair[0].grid))
    programs = math.prod(main.grid)
    fit = occupancy(main, gpu, needs)
    each = math.ceil(programs / most.multiprocessors)
    rounds = math.ceil(each / fit) * fit if each > fit else each
    balance = programs / (rounds * most.multiprocessors)
    hidden = min(1.0, min(fit, each) * main.warps * main.stages / BUSY_WARPS)
    results = sum(t.numel() for t in _tensors(plan.result))
    terms = item.cost.flops / (2 * max(results, 1))
    width = next((t.element_size() for t in _tensors(plan.result)), 2)
    shared = 2 * terms * math.sqrt(max(results, 1) * programs) * width
    arithmetic = item.cost.flops / ((most.single if item.single else most.half) * balance)
    return overhead + max(arithmetic, item.cost.bytes / (most.memory * balance * hidden), shared / most.l2)


def occupancy(launch: Launch, gpu: Gpu, needs: tuple[int, int] | None) -> int:
    """Programs that fit a multiprocessor at a time, at least one."""
    registers, shared = needs or (REGISTERS, 0)
    return max(resident_warps(nearest_known(gpu).arch, launch.warps, registers, shared) // launch.warps, 1)


def _tensors(result: object) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
