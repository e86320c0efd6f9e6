"""Triton's interpreter with the addresses that each program reads and stores, and programs in any order.

A GPU runs the programs of a launch at the same time, in an order that nobody knows. What a program reads must not be
stored by another one, no address may be stored by two, and no lane may leave the tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.ops.contract import tensors
from tests.ops.kernel_contract import poison
from tinysr_kernels.launch.plan import Launch, Library, Plan

ORDERS = ("in order", "reversed", "shuffled")
MARGIN = 1 << 14
"""Bytes around each tensor that belong to none: a lane that leaves its tensor is not in another one."""

Program = tuple[int, int, int]


class Tracker:
    """What the programs of one launch touch. faults: what a GPU would do wrong, one line each."""

    def __init__(self, launch: Launch, order: str) -> None:
        self.name = launch.kernel.function.__name__
        self.order = order
        self.faults: list[str] = []
        self._spaces = [_bytes_of(t) for t in launch.arguments.values() if isinstance(t, Tensor)]
        self._reads: dict[Program, list[np.ndarray]] = defaultdict(list)
        self._stores: dict[Program, list[np.ndarray]] = defaultdict(list)
        self._program: Program = (0, 0, 0)
        self._turns: list[int] = []

    @contextlib.contextmanager
    def tracking(self) -> Iterator[None]:
        """Track the programs that are interpreted inside; afterwards `faults` is complete."""
        builder = interpreter.InterpreterBuilder
        load, store, place = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx

        def masked_load(this: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._note(pointers, mask, self._reads, "reads")
            return load(this, pointers, mask, *rest)

        def masked_store(this: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._note(pointers, mask, self._stores, "stores")
            return store(this, pointers, value, mask, *rest)

        def set_grid_idx(this: Any, *turn: int) -> None:
            self._program = self._whose(turn, this.grid_dim)
            place(this, *self._program)

        def atomic(this: Any, *_: Any) -> Any:
            raise AssertionError("an atomic operation: the order of what it combines is not fixed")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "create_masked_load", masked_load)
            patch.setattr(builder, "create_masked_store", masked_store)
            patch.setattr(builder, "set_grid_idx", set_grid_idx)
            patch.setattr(builder, "create_atomic_rmw", atomic)
            patch.setattr(builder, "create_atomic_cas", atomic)
            yield
        self._judge()

    def _whose(self, turn: tuple[int, ...], grid: Any) -> Program:
        """The program that runs in a turn of the interpreter's loops."""
        if self.order == "in order":
            return turn  # type: ignore[return-value]
        count = int(np.prod(grid))
        if len(self._turns) != count:
            self._turns = list(range(count))[::-1]
            if self.order == "shuffled":
                random.Random(0).shuffle(self._turns)
        number = self._turns[int(np.ravel_multi_index(turn, tuple(grid)))]
        return tuple(int(i) for i in np.unravel_index(number, tuple(grid)))  # type: ignore[return-value]

    def _note(self, pointers: Any, mask: Any, touched: dict[Program, list[np.ndarray]], verb: str) -> None:
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[active].astype(np.int64).reshape(-1)
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        inside = np.zeros(addresses.shape, bool)
        for first, end in self._spaces:
            inside |= (addresses >= first) & (addresses + size <= end)
        if not inside.all():
            self.faults.append(f"{self.name}: {int((~inside).sum())} lanes {verb} outside of every tensor")
        touched[self._program].append(np.unique(addresses))

    def _judge(self) -> None:
        owners: dict[int, Program] = {}
        for program, parts in self._stores.items():
            for address in np.unique(np.concatenate(parts)).tolist():
                if owners.setdefault(address, program) != program:
                    self.faults.append(f"{self.name}: {owners[address]} and {program} store the same address")
                    break
        stored = np.fromiter(owners, np.int64, len(owners))
        for program, parts in self._reads.items():
            for address in np.intersect1d(np.concatenate(parts), stored).tolist():
                if owners[address] != program:
                    self.faults.append(f"{self.name}: {program} reads what {owners[address]} stores")
                    break


def _bytes_of(t: Tensor) -> tuple[int, int]:
    """The addresses of the elements of a dense tensor."""
    first = t.data_ptr()
    return first, first + t.element_size() * (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1)


def apart(plan: Plan) -> Plan:
    """The same plan on copies of its tensors with a margin around each storage; what it shares stays shared."""
    moved: dict[int, Tensor] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in moved:
            room = torch.full((storage.nbytes() + 2 * MARGIN,), 173, dtype=torch.uint8)
            room[MARGIN : MARGIN + storage.nbytes()] = torch.empty(0, dtype=torch.uint8).set_(storage)
            moved[storage._cdata] = room
        offset = value.storage_offset() + MARGIN // value.element_size()
        where = moved[storage._cdata].untyped_storage()
        return torch.empty(0, dtype=value.dtype).set_(where, offset, value.size(), value.stride())

    def again(launch: Launch | Library) -> Launch | Library:
        return dataclasses.replace(launch, arguments={k: copy(v) for k, v in launch.arguments.items()})

    launches = tuple(again(launch) for launch in plan.launches)
    result = tuple(copy(t) for t in plan.result) if isinstance(plan.result, tuple) else copy(plan.result)
    return Plan(result, launches)


def run(plan: Plan, order: str) -> tuple[tuple[Tensor, ...], list[str]]:
    """The results of a copy of the plan, outputs poisoned, programs in this order; and the faults."""
    plan = poison(apart(plan))
    faults: list[str] = []
    for launch in plan.launches:
        if isinstance(launch, Library):
            launch.run()
            continue
        tracker = Tracker(launch, order)
        with tracker.tracking():
            launch.run()
        faults += tracker.faults
    return tensors(plan.result), faults


def judge(plan: Plan, orders: tuple[str, ...] = ORDERS) -> list[str]:
    """What is wrong with the plan's launches on a GPU, nothing if all is well."""
    first, found = run(plan, orders[0])
    for order in orders[1:]:
        results, faults = run(plan, order)
        found += faults
        if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, results, strict=True)):
            found.append(f"other bits {order}")
    return sorted(set(found))


def _bits(t: Tensor) -> Tensor:
    return torch.empty(t.numel(), dtype=t.dtype).copy_(t.reshape(-1)).view(torch.uint8)
