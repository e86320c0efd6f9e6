"""How many kernels the stages of `benchmarks all` compile, counted from their launches; no GPU is needed.

A kernel is compiled once per variant (`machine_code.variant`) and comes from Triton's disk cache after that, so each
stage compiles what no earlier stage has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from benchmarks.commands import correctness, e2e, soak
from benchmarks.commands.correctness import Subject, operators
from benchmarks.static.machine_code import Variant, variant
from benchmarks.static.plan import DEFAULT_GPU
from benchmarks.subjects.families import DEMO
from benchmarks.subjects.networks import DTYPES, OWN_DTYPE, VARIANTS
from tinysr_kernels.launch.device import Gpu, assume
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import Operator

CPU_SECONDS = 0.5
"""Of one compilation; the mean of benchmarks/results/static-triton-3.6.0.json is 0.48."""
PROCESSES = 8
"""That compile at once, on a machine with 16 cores."""


class Count(NamedTuple):
    """Variants that a stage launches, and how many of them no earlier stage has."""

    stage: str
    variants: int
    new: int

    @property
    def seconds(self) -> float:
        """Estimated wall time of the new ones, compiled by PROCESSES at once."""
        return self.new * CPU_SECONDS / PROCESSES


def count(stages: Iterable[tuple[str, set[Variant]]]) -> list[Count]:
    """The counts of stages in the order in which they run."""
    seen: set[Variant] = set()
    counts = []
    for stage, found in stages:
        counts.append(Count(stage, len(found), len(found - seen)))
        seen |= found
    return counts


def stages(gpu: Gpu = DEFAULT_GPU) -> Iterator[tuple[str, set[Variant]]]:
    """The variants that each stage launches, in order."""
    everything = [one for group in correctness.subjects() for one in group]
    own = [Subject(family, known[0], OWN_DTYPE[family]) for family, known in VARIANTS.items()]
    yield "correctness", variants_of((call for one in everything for call in operators(one)), gpu)
    batches = [call for one in own for batch in (1, *e2e.BATCHES) for call in operators(one, batch=batch)]
    frames = [call for one in own for call in operators(one, e2e.FRAME)]
    yield "e2e", variants_of((*batches, *frames), gpu)
    yield "micro", variants_of((call for one in own for call in operators(one)), gpu)
    demos = [Subject(*DEMO, dtype) for dtype in DTYPES]
    yield "quality", variants_of((call for one in demos for call in operators(one)), gpu)
    sizes = {(image.shape[0], image.shape[1]) for image in soak.mixed_images(soak.UNIT)}
    yield "soak", variants_of((call for size in sizes for call in operators(Subject(*DEMO, "float16"), size)), gpu)


def variants_of(operators: Iterable[Operator], gpu: Gpu = DEFAULT_GPU) -> set[Variant]:
    """The distinct compilations of calls on meta tensors."""
    with assume(gpu):
        plans = [call.planned()[0] for call in operators if call.kernels_apply]
    return {variant(gpu.arch, launch) for plan in plans for launch in plan.launches if isinstance(launch, Launch)}


def table(counts: Iterable[Count]) -> list[str]:
    """One line per stage, and their sum."""
    counts = list(counts)
    total = Count("all", sum(one.new for one in counts), sum(one.new for one in counts))
    head = f"{'stage':<12} {'variants':>8} {'new':>5} {f'seconds, {PROCESSES} processes':>22}  (computed, not measured)"
    return [head, *(f"{c.stage:<12} {c.variants:>8} {c.new:>5} {c.seconds:>22.0f}" for c in (*counts, total))]
