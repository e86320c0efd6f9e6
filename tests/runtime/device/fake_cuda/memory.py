"""Memory of the GPU and of the host: who wrote and read it last, when it is free again, and how much there is."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tests.runtime.device.fake_cuda.streams import Lane, Point, covers

if TYPE_CHECKING:
    from tests.runtime.device.fake_cuda.machine import Machine


class Accesses:
    """The last write to some memory, and the reads since. A point is one of work on a lane."""

    def __init__(self) -> None:
        self.written: Point | None = None
        self.read: dict[Lane, int] = {}

    def conflict(self, clock: dict[Lane, int], writes: bool) -> str:
        """What an access that waits for this clock could overtake, or an empty string."""
        if not covers(clock, self.written):
            return f"a write on {self.written[0]}" if self.written else ""
        late = [lane for lane, number in self.read.items() if not covers(clock, (lane, number))]
        return f"a read on {late[0]}" if writes and late else ""

    def note(self, point: Point, writes: bool) -> None:
        if writes:
            self.written, self.read = point, {}
        else:
            self.read[point[0]] = point[1]

    def points(self) -> dict[Lane, int]:
        """The last access by each lane."""
        found = dict(self.read)
        if self.written is not None:
            lane, number = self.written
            found[lane] = max(found.get(lane, 0), number)
        return found


class Block(Accesses):
    """Memory on a GPU, allocated on a lane, or in a graph pool; it lives as long as a tensor on it does.

    PyTorch gives freed memory to whoever allocates next on the same lane, without waiting for any other lane.
    """

    def __init__(self, machine: Machine, lane: Lane, storage: torch.UntypedStorage, pool: Pool | None) -> None:
        super().__init__()
        self.machine, self.lane, self.pool = machine, lane, pool
        self.nbytes = storage.nbytes()
        self.recorded: set[Lane] = set()
        if pool is None:
            machine.take(lane.device, self.nbytes)
            self.written = lane.tick()  # what was there before may still be in use by earlier work of the lane
        else:
            pool.take(self.nbytes)

    def __del__(self) -> None:
        if self.pool is not None:
            self.pool.alive -= self.nbytes
            return
        if self.recorded and self.machine.stuck:
            return  # deferred until no capture is under way, which this allocator never believes again
        clock = dict(self.lane.clock)
        for lane, number in self.machine.host.items():
            clock[lane] = max(clock.get(lane, 0), number)
        for lane, number in self.points().items():
            if lane not in self.recorded and not covers(clock, (lane, number)):
                self.machine.note(f"memory of {self.lane} was freed while {lane} may still use it")
        self.machine.used[self.lane.device] -= self.nbytes


class Pool:
    """The memory of a graph pool: reserved until its last graph is reset."""

    def __init__(self, machine: Machine, device: torch.device) -> None:
        self.machine, self.device = machine, device
        self.alive = self.reserved = self.graphs = 0
        self.opened = False
        self.replayed = Accesses()

    def take(self, nbytes: int) -> None:
        more = self.alive + nbytes - self.reserved
        if more > 0:
            self.machine.take(self.device, more)
            self.reserved += more
        self.alive += nbytes

    def release(self) -> None:
        """A graph was reset."""
        self.graphs -= 1
        if self.graphs == 0:
            self.machine.used[self.device] -= self.reserved
            self.reserved = 0

    @property
    def usable(self) -> bool:
        """Whether another graph can be captured in it."""
        return self.graphs > 0 or not self.opened


class HostMemory:
    """Host memory that copies on a lane read or write while the host goes on, and what of it is pinned."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Accesses]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self.pinned_bytes = 0
        self.most_pinned = 0

    def pin(self, t: Tensor) -> Tensor:
        """Note that a new tensor lies in pinned memory: rounded up to a power of two, as PyTorch does."""
        storage = t.untyped_storage()
        nbytes = 1 << max(storage.nbytes() - 1, 0).bit_length()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        self.pinned_bytes += nbytes
        self.most_pinned = max(self.most_pinned, self.pinned_bytes)
        weakref.finalize(t, self._unpin, storage._cdata, nbytes)
        return t

    def _unpin(self, key: int, nbytes: int) -> None:
        self.pinned_bytes -= nbytes

    def is_pinned(self, t: Tensor) -> bool:
        ref = self._pinned.get(t.untyped_storage()._cdata)
        return ref is not None and not ref.expired()

    def of(self, t: Tensor) -> Accesses:
        """The accesses to a tensor's memory, kept from now on."""
        storage = t.untyped_storage()
        if storage._cdata not in self._known:
            for key in [key for key, (ref, _) in self._known.items() if ref.expired()]:
                del self._known[key]
            self._known[storage._cdata] = StorageWeakRef(storage), Accesses()
        return self._known[storage._cdata][1]

    def known(self, t: Tensor) -> Accesses | None:
        """The accesses to a tensor's memory if any copy ran beside the host."""
        if not self._known or t.layout != torch.strided or t.is_meta:
            return None
        found = self._known.get(t.untyped_storage()._cdata)
        return None if found is None else found[1]
