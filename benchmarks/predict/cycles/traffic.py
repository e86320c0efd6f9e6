"""The memory accesses of a program as the memory system sees them: cycles of shared memory, sectors of global memory.

Shared memory has 32 banks of 4 bytes; an access takes as many cycles as the most words of one bank that a group of
lanes wants: groups of 32 lanes for up to 4 bytes each, of 16 for 8, of 8 for 16 ("shared memory" in the CUDA
programming guide; the groups of wide accesses as measured by others). Global memory is fetched in sectors of 32 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.predict.emulate.state import Access
from benchmarks.predict.execution import GLOBAL, Execution, Placed

BANKS, WORD, SECTOR, LINE = 32, 4, 32, 128
MATRIX_ROWS, MATRIX_ROW = 8, 16
NO_ACCESS, NOT_EXECUTED = -1, -2
STORES = ("STG", "ST")
NARROW = 2
"""Bytes per lane of accesses that are called narrow."""

ACCESS = np.dtype(
    [
        ("wavefronts", np.int32),
        ("tags", np.int32),
        ("tensor", np.int32),
        ("bypass", np.int32),
        ("first", np.int64),
        ("count", np.int64),
    ]
)
"""sm.cpp's `Access`."""
STEP = np.dtype([("instruction", np.int32), ("access", np.int32)])
"""sm.cpp's `Step`."""


@dataclass
class Storage:
    """A tensor, or several in one storage, and what one program does with it.

    read, written: bytes of the distinct sectors that it touches. bypassing: bytes that it loads past the L1, again each
    time. stored: bytes that it stores.
    """

    name: str
    nbytes: int
    weight: bool
    read: int = 0
    bypassing: int = 0
    written: int = 0
    stored: int = 0


@dataclass
class Traffic:
    """A program's traces and accesses as sm.cpp reads them.

    accesses: [a] of ACCESS; sectors: numbers of sectors; steps: [s] of STEP, warp after warp, each from first[w] on.
    conflicts: cycles of shared memory over those without bank conflicts. narrow_share: of the bytes of global memory.
    """

    accesses: NDArray[np.void]
    sectors: NDArray[np.int64]
    steps: NDArray[np.void]
    first: NDArray[np.int64]
    storages: list[Storage]
    conflicts: float = 1.0
    narrow_share: float = 0.0


@dataclass
class _Rows:
    """The accesses so far: `Traffic.accesses`, their sectors, and which row a warp's access has."""

    rows: list[tuple[int, int, int, int, int, int]] = field(default_factory=list)
    sectors: list[NDArray[np.int64]] = field(default_factory=list)
    total: int = 0
    place: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(
        self, access: Access, warp: int, cycles: int, found: NDArray[np.int64], tags: int = 0, storage: int = -1
    ) -> None:
        """The access of one warp, which some of its lanes execute."""
        self.place[id(access), warp] = len(self.rows)
        self.rows.append((cycles, tags, storage, access.bypass, self.total, len(found)))
        self.sectors.append(found)
        self.total += len(found)

    def add_none(self, access: Access, warp: int) -> None:
        """An access that no lane of the warp executes."""
        self.place[id(access), warp] = NOT_EXECUTED


def traffic(execution: Execution) -> Traffic:
    """What the executed program asks of the memory system."""
    storages, number = _storages(execution.tensors)
    rows = _Rows()
    touched: dict[tuple[int, str], list[NDArray[np.int64]]] = {}
    narrow = everything = 0
    cycles = least = 0
    for access in execution.accesses():
        if access.kind in GLOBAL:
            moved = _add_global(access, rows, storages, touched, execution.tensors, number)
            everything += moved
            narrow += moved if access.width <= NARROW else 0
        else:
            taken, ideal = _add_shared(access, rows)
            cycles, least = cycles + taken, least + ideal
    for (storage, what), found in touched.items():
        setattr(storages[storage], what, len(np.unique(np.concatenate(found))) * SECTOR)
    steps, first = _steps(execution, rows.place)
    return Traffic(
        np.array(rows.rows, dtype=ACCESS),
        np.concatenate([np.zeros(0, np.int64), *rows.sectors]),
        steps,
        first,
        storages,
        conflicts=cycles / least if least else 1.0,
        narrow_share=narrow / everything if everything else 0.0,
    )


def _add_global(
    access: Access,
    rows: _Rows,
    storages: list[Storage],
    touched: dict[tuple[int, str], list[NDArray[np.int64]]],
    tensors: Sequence[Placed],
    number: dict[int, int],
) -> int:
    """Add an access to global memory; the bytes that its lanes move."""
    store = access.kind in STORES
    everything = 0
    for warp, found, lanes in zip(map(int, access.warps), _sectors(access), access.active.sum(1), strict=True):
        if not len(found):
            rows.add_none(access, warp)
            continue
        storage = _storage_of(found[0] * SECTOR, tensors, number)
        tags = len(np.unique(found // (LINE // SECTOR)))
        rows.add(access, warp, _data_cycles(access, len(found)), found, tags, storage)
        touched.setdefault((storage, "written" if store else "read"), []).append(found)
        moved = int(lanes) * access.width
        everything += moved
        if store:
            storages[storage].stored += moved
        elif access.bypass:
            storages[storage].bypassing += len(found) * SECTOR
    return everything


def _add_shared(access: Access, rows: _Rows) -> tuple[int, int]:
    """Add an access to shared memory; its cycles, and what they would be without bank conflicts."""
    cycles, least = wavefronts(access)
    for warp, taken in zip(map(int, access.warps), cycles, strict=True):
        if taken:
            rows.add(access, warp, int(taken), np.zeros(0, np.int64))
        else:
            rows.add_none(access, warp)
    return int(cycles.sum()), int(least.sum())


def _storages(tensors: Sequence[Placed]) -> tuple[list[Storage], dict[int, int]]:
    number: dict[int, int] = {}
    made: list[Storage] = []
    for t in tensors:
        if t.storage in number:
            one = made[number[t.storage]]
            one.name += f"/{t.name}"
            one.nbytes = max(one.nbytes, t.end - t.begin)
        else:
            number[t.storage] = len(made)
            made.append(Storage(t.name, t.end - t.begin, t.weight))
    return made, number


def _storage_of(address: int, tensors: Sequence[Placed], number: dict[int, int]) -> int:
    """The storage of the tensor that a sector touches."""
    return number[next(t.storage for t in tensors if t.begin < address + SECTOR and address < t.end)]


def _data_cycles(access: Access, sectors: int) -> int:
    """Cycles of the L1's data port: 128 bytes each; asynchronous copies pay when their data arrives."""
    if access.kind == "LDGSTS":
        return 0
    return -(-sectors * SECTOR // LINE) if access.kind in STORES else max(1, access.width // WORD)


def _sectors(access: Access) -> list[NDArray[np.int64]]:
    """The numbers of the sectors of each warp, sorted."""
    if access.address is None:
        return [np.zeros(0, np.int64) for _ in access.warps]
    address = access.address.astype(np.int64)
    both = np.concatenate([address // SECTOR, (address + access.width - 1) // SECTOR], axis=1)
    active = np.concatenate([access.active, access.active], axis=1)
    return [np.unique(row[lanes]) for row, lanes in zip(both, active, strict=True)]


def wavefronts(access: Access) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cycles of shared memory per warp, and what they would be without bank conflicts; 0 for a warp without lanes."""
    active, warps = access.active, len(access.warps)
    matrices = access.kind in ("LDSM", "STSM")
    width = MATRIX_ROW if matrices else access.width
    groups = access.width if matrices else {8: 2, 16: 4}.get(width, 1)
    per_group = MATRIX_ROWS if matrices else 32 // groups
    executed = active.any(1)
    ideal = np.where(executed, groups, 0)
    if access.address is None:
        return ideal, ideal
    words = max(width // WORD, 1)
    lanes = slice(0, groups * per_group)
    address = access.address.astype(np.int64)[:, lanes].reshape(warps * groups, per_group)
    on = (np.ones_like(active) if matrices else active)[:, lanes].reshape(warps * groups, per_group)
    # Lanes that are off repeat one that is on: the same word is read once.
    some = address[np.arange(len(address)), on.argmax(1)]
    address = np.where(on, address, some[:, None])
    wanted = (address[:, :, None] // WORD + np.arange(words)).reshape(len(address), -1)
    wanted.sort(axis=1)
    new = np.ones_like(wanted, dtype=bool)
    new[:, 1:] = wanted[:, 1:] != wanted[:, :-1]
    row = np.arange(len(wanted))[:, None]
    counts = np.bincount((row * BANKS + wanted % BANKS)[new], minlength=len(wanted) * BANKS).reshape(-1, BANKS).max(1)
    counts = np.where(on.any(1), counts, 0).reshape(warps, groups).sum(1)
    return np.where(executed, counts, 0), ideal


def _steps(execution: Execution, place: dict[tuple[int, int], int]) -> tuple[NDArray[np.void], NDArray[np.int64]]:
    """The trace of every warp, one after another."""
    of_warp: dict[int, NDArray[np.void]] = {}
    for numbers, steps in execution.groups:
        instructions = np.array([at for at, _, _ in steps], dtype=np.int32)
        executed = np.array([ran for _, _, ran in steps])
        with_access = [(n, access) for n, (_, access, _) in enumerate(steps) if access is not None]
        for warp in map(int, numbers):
            made = np.zeros(len(steps), dtype=STEP)
            made["instruction"] = instructions
            made["access"] = np.where(executed, NO_ACCESS, NOT_EXECUTED)
            for n, access in with_access:
                made["access"][n] = place[id(access), warp]
            of_warp[warp] = made
    ordered = [of_warp[warp] for warp in sorted(of_warp)]
    first = np.concatenate([[0], np.cumsum([len(one) for one in ordered])]).astype(np.int64)
    return np.concatenate(ordered), first
