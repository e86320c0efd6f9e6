"""How long a candidate should take, from its bytes, its waves and its occupancy. It orders what is then measured.

A call moves its bytes through memory once. Programs that each compute r of R results of K terms share what they load
with nobody: a square tile loads 2 sqrt(r) K values, hence 2 K sqrt(R G) values for G programs in all, through the L2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from autotune.items.candidates import Candidate
from autotune.items.work import Item
from benchmarks.hardware import Ceilings, resident_warps
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Launch

LAUNCH = 1e-6
"""Seconds that each dependent node of a graph takes (0.6 to 1.0 us on data-center cards, measured by others)."""
TRIP = 1e-6
"""Seconds from the begin of a kernel to its end that no other program hides: a load and the store that waits for it."""
LATENCY = 0.7e-6
"""Seconds from a load under way to its value while memory is busy."""
LIBRARY = 0.75
"""Part of the ceiling that a library's kernel is expected to reach; only the order depends on it."""
IN_FLIGHT = 2048
"""Bytes that a warp has under way in each pipeline stage at most: four loads of 16 bytes a thread."""
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
    overhead = (LAUNCH + TRIP) * plan.kernels
    own = [launch for launch in plan.launches if isinstance(launch, Launch)]
    floor = most.floor(item.cost, item.bits)
    if not own:
        return overhead + floor / LIBRARY
    resources = built.resources if built is not None and len(built.resources) == len(own) else [None] * len(own)
    main, needs = max(zip(own, resources, strict=True), key=lambda pair: _bytes(pair[0]))
    programs = math.prod(main.grid)
    fit = occupancy(main, gpu, needs)
    each = math.ceil(programs / most.multiprocessors)
    rounds = math.ceil(each / fit) * fit if each > fit else each
    active = programs / (rounds * most.multiprocessors)
    moved = item.cost.bytes + _scratch_bytes(own)
    l2 = most.l2_rate(active)
    # What an active multiprocessor has under way at a time is what it gets in one latency.
    under_way = min(fit, each) * min(main.num_warps * main.num_stages * IN_FLIGHT, moved / programs)
    memory = min(most.memory, active * most.multiprocessors * under_way / LATENCY, l2)
    results = sum(t.numel() for t in _tensors(plan.result))
    terms = item.cost.flops / (2 * max(results, 1))
    width = next((t.element_size() for t in _tensors(plan.result)), 2)
    shared = 2 * terms * math.sqrt(max(results, 1) * programs) * width
    # Programs that are left for a last round have the tensor cores to themselves, but not more loads under way.
    computing = programs / (each * most.multiprocessors) * most.rate(item.bits)
    # Of three that take turns in one pipeline the longest counts most, but not alone.
    return overhead + math.hypot(item.cost.flops / computing, moved / memory, shared / l2)


def _bytes(launch: Launch) -> int:
    """Of the tensors that a launch reads and writes."""
    return sum(t.nbytes for t in launch.arguments.values() if isinstance(t, Tensor))


def _scratch_bytes(launches: Sequence[Launch]) -> int:
    """What launches leave for each other and for nobody else: written once and read once."""
    found = {id(v): v for x in launches for k, v in x.arguments.items() if k.startswith("scratch")}
    return sum(2 * t.nbytes for t in found.values() if isinstance(t, Tensor))


def occupancy(launch: Launch, gpu: Gpu, needs: tuple[int, int] | None) -> int:
    """Programs that fit a multiprocessor at a time, at least one."""
    registers, shared = needs or (REGISTERS, 0)
    return max(resident_warps(gpu.arch, launch.num_warps, registers, shared) // launch.num_warps, 1)


def _tensors(result: object) -> list[Tensor]:
    return [t for t in (result if isinstance(result, tuple) else (result,)) if isinstance(t, Tensor)]
