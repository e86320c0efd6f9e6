"""Trace a network: every operator call in order and every kernel of each, recorded from the actual dispatch.

On meta tensors it takes neither memory nor compute, so full-size networks can be traced anywhere. A number that the
host reads from a meta tensor reads 1, so a condition on values holds ("is the result finite?": yes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinysr_kernels.launch.plan import Launch, Plan
from tinysr_kernels.ops.call import REGISTRY, Cost, Operator
from tinysr_kernels.ops.layout import nbytes

READ_BY_HOST = "aten::_local_scalar_dense"
ATOMIC = ("aten::scaled_dot_product_attention", "aten::upsample_nearest2d", "aten::upsample_bicubic2d")
"""Operations that run as one kernel on a GPU, although they decompose on meta tensors."""
MULTIPLY = (
    "aten::convolution", "aten::_convolution", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
    "aten::_scaled_mm", "aten::scaled_dot_product_attention",
)  # fmt: skip
"""Operations that multiply matrices, in library forms."""
LAUNCH_NOTHING = ("aten::empty", "aten::new_empty", "aten::_unsafe_view")
OVERWRITES = ("aten::copy_", "aten::fill_", "aten::zero_")
"""In-place operations that do not read what they write to."""
_UNRECORDED: ContextVar[bool] = ContextVar("unrecorded", default=False)


@dataclass(frozen=True)
class Moved:
    """A tensor that a launch reads or writes.

    weight: whether it is a buffer of the network. fp8: whether it is e4m3.
    """

    shape: tuple[int, ...]
    bytes: int
    weight: bool = False
    fp8: bool = False


@dataclass(frozen=True)
class Step:
    """One kernel launch: the kernel's name, the tensors it moves, each once, and its share of the call's FLOPs.

    See `_assigned` for the FLOPs of a call of several launches.
    """

    kernel: str
    reads: tuple[Moved, ...]
    writes: tuple[Moved, ...]
    flops: int = 0

    @property
    def moved(self) -> tuple[Moved, ...]:
        """Everything read and written."""
        return self.reads + self.writes

    @property
    def fp8(self) -> bool:
        """Whether its matmuls take e4m3 operands, as those of e4m3 weights do."""
        return any(m.weight and m.fp8 for m in self.reads)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(m.bytes for m in self.moved)


@dataclass(frozen=True)
class Call:
    """One call: operator, shapes of its tensor inputs and of its first output, cost, and the launches it makes.

    source: of its launch configuration; "library" for a call of PyTorch's libraries, a step for each of its operations;
    "reference" for any other (its one step then stands for any number). part: the part of the network it belongs to
    (`trace`'s parts). operator: the call itself, for `tinysr::` operators.
    """

    op: str
    inputs: tuple[tuple[int, ...], ...]
    output: tuple[int, ...]
    cost: Cost
    source: str = "reference"
    part: str = ""
    steps: tuple[Step, ...] = ()
    operator: Operator | None = field(default=None, repr=False, compare=False)


class ReadingOnes(TorchDispatchMode):
    """Inside, a number that the host reads from a meta tensor reads 1; otherwise reading it fails."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would import its compiler for that, which takes seconds at the first `compile`

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name == READ_BY_HOST and args[0].is_meta:
            return 1
        if func._schema.name in ATOMIC:
            return self.atomic(func, args, kwargs)
        with self:
            # A composite ATen operation launches its parts; undecomposed it would count as one launch, or as a view.
            out = func.decompose(*args, **kwargs)
        return self.atomic(func, args, kwargs) if out is NotImplemented else out

    def atomic(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation that is not composite."""
        return func(*args, **kwargs)


class _Recorder(ReadingOnes):
    """Records `tinysr::` calls with their cost functions, other kernels as one read and one write."""

    def __init__(
        self, weights: frozenset[int], part: str = "", *, kernels: bool = False, library: bool = False
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.library = library
        self.weights = weights
        self.part = part
        self.calls: list[Call] = []
        self.filled: set[int] = set()
        self._known: dict[tuple[Any, ...], tuple[Step, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func._schema.name == READ_BY_HOST:
            self._note(READ_BY_HOST, (args[0],), (args[0],), Cost(0, args[0].element_size()))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def atomic(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the operation and record what it launches."""
        name = func._schema.name
        out = func(*args, **kwargs)
        results = _tensors(out)
        if _UNRECORDED.get() or not results or _is_view(func):
            return out
        self.filled.update(map(_storage, results))
        if func.namespace == "tinysr":
            self._operator(REGISTRY[name.removeprefix("tinysr::")](*args, **kwargs), results)
        else:
            given = _tensors((args[1:] if name in OVERWRITES else args, kwargs))
            first = results[0]
            self._note(name, given, results, Cost(first.numel(), nbytes(*given) + nbytes(first)))
        return out

    def _operator(self, call: Operator, results: tuple[Tensor, ...]) -> None:
        cost = call.cost()
        if self.library and call.library_applies:
            operations = self._library(call)
            steps = _assigned(operations, [step.kernel in MULTIPLY for step in operations], cost.flops)
            self._note(call.name, call.tensors, results, cost, "library", steps, call)
            return
        if not (self.kernels and call.kernels_apply):
            self._note(call.name, call.tensors, results, cost, operator=call)
            return
        # A plan copies inputs that are not dense in the layout it needs: launches like any other.
        with _Recorder(self.weights) as copies:
            plan, choice = call.planned()
        own = list(self._launches(plan, copies.filled.union(map(_storage, call.tensors))))
        assigned = _assigned([step for step, _ in own], [multiplies for _, multiplies in own], cost.flops)
        self._note(call.name, call.tensors, results, cost, choice.source, (*copies.steps, *assigned), call)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps of all calls, without their FLOPs."""
        return tuple(replace(step, flops=0) for call in self.calls for step in call.steps)

    def _library(self, call: Operator) -> tuple[Step, ...]:
        """What a call's library form launches, found once for all calls of equal arguments."""
        key = (call.name, *(self._described(value) for value in call.arguments.values()))
        if key not in self._known:
            with _Recorder(self.weights) as inside:
                call.library()
            self._known[key] = inside.steps
        return self._known[key]

    def _described(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.shape, value.stride(), value.dtype, _storage(value) in self.weights

    def _launches(self, plan: Plan, filled: set[int]) -> Iterator[tuple[Step, bool]]:
        """One step per kernel, and whether it multiplies matrices.

        filled: the storages that hold something before the first launch. A launch writes what holds nothing yet, and
        the plan's results unless they are its `x`: a norm reads what the convolution before it has written there.
        """
        results = {_storage(t) for t in _tensors(plan.result)}
        for launch in plan.launches:
            reads: list[Tensor] = []
            writes: list[Tensor] = []
            for name, t in launch.arguments.items():
                if not isinstance(t, Tensor):
                    continue
                written = _storage(t) not in filled or (_storage(t) in results and name != "x")
                (writes if written else reads).append(t)
            filled.update(map(_storage, writes))
            moved = self._moved(reads), self._moved(writes)
            if isinstance(launch, Launch):
                yield Step(launch.kernel.function.__name__, *moved), launch.kernel.multiplies
                continue
            # Which tensors each kernel of a library moves is unknown: all are assigned to the first.
            name = launch.function.__name__
            yield Step(name, *moved), True
            for i in range(2, launch.kernels + 1):
                yield Step(f"{name} ({i} of {launch.kernels})", (), ()), False

    def _moved(self, tensors: Iterable[Tensor]) -> tuple[Moved, ...]:
        distinct = {(_storage(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}
        e4m3 = torch.float8_e4m3fn
        return tuple(
            Moved(tuple(t.shape), nbytes(t), _storage(t) in self.weights, t.dtype == e4m3) for t in distinct.values()
        )

    def _note(
        self,
        name: str,
        given: tuple[Tensor, ...],
        results: tuple[Tensor, ...],
        cost: Cost,
        source: str = "reference",
        steps: tuple[Step, ...] = (),
        operator: Operator | None = None,
    ) -> None:
        steps = steps or (Step(name, self._moved(given), self._moved(results), cost.flops),)
        shapes = tuple(tuple(t.shape) for t in given)
        output = tuple(results[0].shape)
        self.calls.append(Call(name, shapes, output, cost, source, self.part, steps, operator))


def _assigned(steps: Sequence[Step], multiply: Sequence[bool], flops: int) -> tuple[Step, ...]:
    """The steps of a call with its FLOPs: on those that multiply matrices, by bytes written, as far as there are any.

    The FLOPs of other calls are assigned to the step that moves the most bytes.
    """
    if not any(multiply):
        most = max(range(len(steps)), key=lambda i: steps[i].bytes)
        return tuple(replace(step, flops=flops if i == most else 0) for i, step in enumerate(steps))
    written = [1 + sum(m.bytes for m in step.writes) if yes else 0 for step, yes in zip(steps, multiply, strict=True)]
    ends = [flops * end // sum(written) for end in accumulate(written, initial=0)]
    return tuple(replace(step, flops=end - begin) for step, (begin, end) in zip(steps, pairwise(ends), strict=True))


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return tuple(leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _storage(t: Tensor) -> int:
    """Identifies the storage of a tensor, on the meta device too, where addresses are all 0."""
    return t.untyped_storage()._cdata


def _is_view(func: Any) -> bool:
    """Whether the call only makes a view or an empty tensor and launches nothing."""
    if func.is_view or func._schema.name.startswith(LAUNCH_NOTHING):
        return True
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


@torch.inference_mode()
def trace(
    function: Callable[..., Any],
    *args: Any,
    kernels: bool = False,
    library: bool = False,
    parts: Mapping[str, nn.Module] | None = None,
    ends: tuple[str, str] = ("", ""),
) -> list[Call]:
    """Run `function(*args)` (usually a network on meta tensors) and return its calls in order.

    kernels: plan each call as if its kernels ran, one step per launch. library: take each call by its library form, one
    step per operation. parts: modules by name, in the order in which
    they run; a call belongs to the module that runs or ran last, calls before the first to ends[0], calls after the
    last to ends[1]. The modules' buffers are the weights.
    """
    parts = parts or {}
    weights = frozenset(_storage(t) for module in parts.values() for t in module.buffers())
    recorder = _Recorder(weights, ends[0], kernels=kernels, library=library)
    with contextlib.ExitStack() as stack:
        for i, (name, module) in enumerate(parts.items()):
            after = ends[1] if i == len(parts) - 1 else name
            stack.callback(module.register_forward_pre_hook(_entering(recorder, name)).remove)
            stack.callback(module.register_forward_hook(_entering(recorder, after)).remove)
        with recorder:
            function(*args)
    return recorder.calls


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, `trace` records nothing: for constants that are made once and then kept."""
    token = _UNRECORDED.set(True)
    try:
        yield
    finally:
        _UNRECORDED.reset(token)


def _entering(recorder: _Recorder, part: str) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        recorder.part = part

    return hook
