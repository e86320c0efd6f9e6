"""The launches of a network on a GPU, as what their time depends on: the variant, the grid, and the arguments."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from benchmarks.hardware import floor, keeps
from benchmarks.static.machine_code import Variant, variant
from benchmarks.static.plan import calls
from benchmarks.subjects.networks import DTYPES, OWN_DTYPE, network
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.hardware import Card, representative
from tinysr_kernels.launch.plan import Launch, Library
from tinysr_kernels.ops.trace import Call, Step

SIZE = (128, 128)


@dataclass(frozen=True)
class TensorArgument:
    """A tensor argument. storage: equal for tensors that share memory; offset, span: the bytes of it, from its
    storage's begin; weight: whether it is a buffer of the network."""

    storage: int
    offset: int
    span: int
    weight: bool = False


Argument = TensorArgument | int | float | str | None


@dataclass(frozen=True)
class Program:
    """What one launch executes: the variant, its grid, and its arguments by name, without compile-time constants."""

    variant: Variant
    grid: tuple[int, int, int]
    arguments: tuple[tuple[str, Argument], ...]

    @property
    def programs(self) -> int:
        """Programs in the grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def digest(self) -> str:
        """Equal for launches of the same machine code with the same grid and arguments, wherever their tensors lie."""
        text = repr((self.variant.digest, self.grid, self.arguments))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Planned:
    """One launch of a network.

    call: the number of its call, in order. step: what it moves, and its FLOPs as in docs/plan.md. output: the shape of
    its call's result. config: the launch configuration. program: None for the kernels of libraries and of ATen.
    single, weights: as `hardware.floor` wants them, all weights of the network in bytes.
    """

    call: int
    op: str
    part: str
    step: Step
    output: tuple[int, ...]
    config: Mapping[str, Any]
    program: Program | None
    single: bool
    weights: int

    @property
    def kernel(self) -> str:
        """The kernel's name."""
        return self.step.kernel

    def floor_us(self, card: Card) -> float:
        """The launch's roofline in microseconds."""
        return 1e6 * floor(card, self.step, self.single, keeps(card, self.weights))


def network_launches(family: str, name: str, arch: int) -> list[Planned]:
    """Every launch for one 128x128 image, in order, planned for the GPU that stands for the architecture."""
    dtype = OWN_DTYPE[family]
    model = network(family, name, DTYPES[dtype])
    buffers = list(model.network.buffers())
    nbytes = sum(t.nbytes for t in buffers)
    # Weights that all stay in the L2 from one image to the next are tensors like any other.
    cached = keeps(representative(arch), nbytes)
    weights = frozenset[int]() if cached else frozenset(t.untyped_storage()._cdata for t in buffers)
    return [
        Planned(n, call.op, call.part, step, call.output, *own, dtype == "float32", nbytes)
        for n, call in enumerate(calls(model, *SIZE, 1, GPUS[arch]))
        for step, own in zip(call.steps, _programs(call, arch, weights), strict=True)
    ]


def _programs(call: Call, arch: int, weights: frozenset[int]) -> Iterator[tuple[Mapping[str, Any], Program | None]]:
    """Configuration and program of each step of a call; copies that precede the call's own launches have none."""
    launches: list[Launch | Library | None] = []
    config: Mapping[str, Any] = {}
    if call.operator is not None and call.source != "reference":
        with assume(GPUS[arch]):
            plan, choice = call.operator.planned()
        config = dataclasses.asdict(choice.config)
        for made in plan.launches:
            launches += [made] * (made.kernels if isinstance(made, Library) else 1)
    steps: Sequence[Step] = call.steps
    launches = [None] * (len(steps) - len(launches)) + launches
    for launch in launches:
        yield config, program(launch, arch, weights) if isinstance(launch, Launch) else None


def program(launch: Launch, arch: int, weights: frozenset[int] = frozenset()) -> Program:
    """What the launch executes. weights: the storages that are buffers of a network."""
    numbers: dict[int, int] = {}
    made = variant(arch, launch)
    arguments: list[tuple[str, Argument]] = []
    for name, kind in made.signature:
        value = launch.arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(value, Tensor):
            storage = value.untyped_storage()._cdata
            number = numbers.setdefault(storage, len(numbers))
            value = _tensor(value, number, storage in weights)
        arguments.append((name, value))
    grid = (*launch.grid, 1, 1)[:3]
    return Program(made, (grid[0], grid[1], grid[2]), tuple(arguments))


def _tensor(t: Tensor, storage: int, weight: bool) -> TensorArgument:
    offset = cast(int, t.storage_offset() * t.element_size())
    return TensorArgument(storage, offset, _span(t), weight)


def _span(t: Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    last = sum((extent - 1) * stride for extent, stride in zip(t.shape, t.stride(), strict=True))
    return int(last + 1) * t.element_size() if t.numel() else 0
