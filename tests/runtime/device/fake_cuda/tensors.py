"""Tensors that lie on the GPU, and the mode that sees every operation of a thread on them.

A `CudaTensor` wraps a tensor of the CPU, its data. Operations of the package (`tinysr::`) run as what their code does,
so that each operation of PyTorch is one of a GPU, checked and recorded by itself.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.runtime.device.fake_cuda.graphs import Capture, Operation, tensors_in
from tests.runtime.device.fake_cuda.memory import Block
from tests.runtime.device.fake_cuda.streams import NOT_IN_CAPTURE, Fault, Lane

if TYPE_CHECKING:
    from tests.runtime.device.fake_cuda.machine import Machine

aten = torch.ops.aten
READING_NOTHING = ("empty", "zeros", "ones", "full", "rand", "new_", "scalar_tensor", "arange", "linspace", "eye")
SYNCHRONIZING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique", "unique")


class CudaTensor(Tensor):
    """A tensor on a GPU. data_: its elements, a tensor of the CPU. block: its memory."""

    data_: Tensor
    block: Block

    @staticmethod
    def __new__(cls, data: Tensor, device: torch.device, block: Block) -> CudaTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls, data.shape, strides=data.stride(), storage_offset=data.storage_offset(), dtype=data.dtype,
            device=device,
        )  # fmt: skip
        made.data_, made.block = data, block
        return made

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.data_}, device={self.device})"

    # PyTorch without CUDA has no device guard, which these methods, written by hand in C++, would take.

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return aten.copy_.default(self, source, non_blocking)

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        if self.data_.is_contiguous(memory_format=memory_format):
            return self
        return aten.clone.default(self, memory_format=memory_format)

    def item(self) -> Any:
        return aten._local_scalar_dense.default(self)

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Tensor:
        if any(isinstance(part, Tensor) for part in (index if isinstance(index, tuple) else [index])):
            return aten.index.Tensor(self, list(index) if isinstance(index, tuple) else [index])
        return CudaTensor(self.data_[index], self.device, self.block)

    def __setitem__(self, index: Any, value: Any) -> None:
        part = self[index]
        part.copy_(value) if isinstance(value, Tensor) else part.fill_(value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Fault(f"{func} ran on a thread that the fake does not see")


def _is_gpu(value: Any) -> bool:
    return isinstance(value, CudaTensor)


class Watch(TorchDispatchMode):
    """Sees every operation of a thread."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it would import it, which takes seconds

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.blocks: weakref.WeakValueDictionary[int, Block] = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tensors_in((args, kwargs))
        asked = next((a for a in (kwargs.get("device"), *args) if isinstance(a, torch.device)), None)
        pinned = bool(kwargs.get("pin_memory"))
        on_gpu = any(map(_is_gpu, leaves)) or (asked is not None and asked.type == "cuda")
        name = func._schema.name
        if on_gpu and name.startswith("tinysr::"):
            from tinysr_kernels.ops import REGISTRY

            with self:
                return REGISTRY[name.removeprefix("tinysr::")](*args, **kwargs).compute()
        if func is aten.is_pinned.default:
            return not _is_gpu(args[0]) and self.machine.memory.is_pinned(args[0])
        if asked is not None and asked.type == "meta":
            return func(*self._data(args), **self._data(kwargs))
        if not on_gpu and not pinned:
            self._on_host(func, args, kwargs)
            return func(*args, **kwargs)
        if _is_composite(func):
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten.copy_.default:
            return self._copy(args[0], args[1], bool(args[2] if len(args) > 2 else kwargs.get("non_blocking", False)))
        if func is aten._to_copy.default:
            return self._moved(args[0], asked or args[0].device, kwargs)
        if pinned:
            self.machine.allocate_pinned()
            data = func(*self._data(args), **self._data(kwargs) | {"pin_memory": False, "device": torch.device("cpu")})
            return self.machine.memory.pin(data)
        return self._compute(func, args, kwargs, leaves, asked)

    def _data(self, tree: Any) -> Any:
        return _mapped(tree, lambda t: t.data_ if _is_gpu(t) else t)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> None:
        """Work of the host on memory that a copy may still read or write."""
        for t, writes in _accesses(func, args, kwargs):
            known = self.machine.memory.known(t)
            overtaken = known.conflict(self.machine.host, writes) if known is not None else ""
            if overtaken:
                raise self.machine.fault(f"the host's {func} may overtake {overtaken}")

    def _moved(self, source: Tensor, device: torch.device, kwargs: dict[str, Any]) -> Tensor:
        """`_to_copy`: converted where it lies, then copied to where it goes."""
        dtype = kwargs.get("dtype") or source.dtype
        layout = kwargs.get("memory_format") or torch.preserve_format
        with self:
            if source.dtype != dtype or source.device == device:
                converted = torch.empty_like(source, dtype=dtype, memory_format=layout)
                converted.copy_(source)
                source = converted
            if source.device == device:
                return source
            moved = torch.empty_like(source, device=device, memory_format=layout)
            return moved.copy_(source, bool(kwargs.get("non_blocking", False)))

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if target.device == source.device:
            return self._compute(aten.copy_.default, (target, source), {}, [target, source], None)
        machine = self.machine
        capture = machine.capture()
        between_gpus = _is_gpu(target) and _is_gpu(source)
        gpu = source if _is_gpu(source) else target
        lane = machine.current_stream(gpu.device).lane
        host = None if between_gpus else target if gpu is source else source
        pinned = host is not None and machine.memory.is_pinned(host)
        if capture is not None and not (non_blocking and (pinned or between_gpus)):
            machine.refuse(NOT_IN_CAPTURE, capture)
        point = machine.begin(lane)
        if between_gpus:  # PyTorch lets each device's current stream wait for the other's
            other = machine.current_stream(target.device).lane
            lane.clock.update({k: max(v, lane.clock.get(k, 0)) for k, v in other.clock.items()})
        for t, writes in ((source, False), (target, True)):
            if capture is not None:
                continue
            if _is_gpu(t):
                machine.access(lane, point, t.block, "copy", writes)
            else:
                known = machine.memory.of(t)
                overtaken = known.conflict(lane.clock, writes)
                if overtaken:
                    raise machine.fault(f"a copy on {lane} may overtake {overtaken} of host memory")
                known.note(point, writes)
        if between_gpus:
            other.clock.update({k: max(v, other.clock.get(k, 0)) for k, v in lane.clock.items()})
        # A copy to pageable memory without waiting is not complete on return either; one from it has left it.
        if host is not None and (not non_blocking or (gpu is target and not pinned)):
            machine.wait_on_host(lane)
        self._data(target).copy_(self._data(source))
        if capture is not None:
            self._record(capture, aten.copy_.default, (target, source), {}, self._data(target), [source], [target])
        return target

    def _compute(self, func: Any, args: Any, kwargs: Any, leaves: list[Tensor], asked: torch.device | None) -> Any:
        machine = self.machine
        name = func._schema.name.removeprefix("aten::")
        makes = name.startswith(READING_NOTHING)
        devices = {t.device for t in leaves if _is_gpu(t) or t.dim() > 0}
        if makes and asked is not None:
            devices = {asked}
        if len(devices) > 1:
            found = " and ".join(sorted(map(str, devices)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two: {found}")
        device = torch.device(devices.pop())
        options = {"device": torch.device("cpu")} if asked is not None else {}
        if device.type != "cuda":  # empty_like(gpu, device="cpu")
            return func(*self._data(args), **self._data(kwargs) | options)
        device = torch.device("cuda", machine.index(device))
        lane, capture = machine.current_stream(device).lane, machine.capture()
        views = _is_view(func)
        accesses = [] if makes or views else [(t, writes) for t, writes in _accesses(func, args, kwargs) if _is_gpu(t)]
        if name in SYNCHRONIZING:
            if capture is not None:
                machine.refuse(NOT_IN_CAPTURE, capture)
            machine.wait_on_host(lane)
        if not makes and not views:
            point = machine.begin(lane)
            machine.load(name, leaves[0].dtype, capture)
            for t, writes in accesses if capture is None else ():  # what is captured runs later
                machine.access(lane, point, t.block, name, writes)
        data = func(*self._data(args), **self._data(kwargs) | options)
        result = _mapped(data, lambda t: self._wrapped(t, lane, capture, leaves))
        if not views and not name.startswith(("empty", "new_empty")):
            point = point if not makes else machine.begin(lane)
            made = tensors_in(result)
            for t in made if capture is None else ():
                t.block.note(point, writes=True)
            if capture is not None:
                reads = [t for t, writes in accesses if not writes]
                self._record(capture, func, args, kwargs | options, data, reads, made)
        return result

    def _wrapped(self, data: Tensor, lane: Lane, capture: Capture | None, leaves: list[Tensor]) -> Tensor:
        for t in leaves:
            if _is_gpu(t) and t.data_ is data:
                return t
        storage = data.untyped_storage()
        block = self.blocks.get(storage._cdata)
        if block is None:
            block = Block(self.machine, lane, storage, capture.pool if capture is not None else None)
            self.blocks[storage._cdata] = block
            if capture is not None:
                capture.blocks.add(weakref.ref(block))
                capture.tensors.append(data)
        return CudaTensor(data, lane.device, block)

    def _record(
        self, capture: Capture, func: Any, args: Any, kwargs: Any, results: Any, reads: list[Any], writes: list[Any]
    ) -> None:
        # A scalar in host memory becomes a kernel's argument when it is captured.
        fixed = _mapped((args, kwargs), lambda t: t.data_ if _is_gpu(t) else t.clone())
        refs = [[weakref.ref(t.block) for t in tensors if _is_gpu(t)] for tensors in (reads, writes)]
        capture.operations.append(Operation(func, fixed[0], fixed[1], refs[0], refs[1], results))


def _mapped(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Arguments or results with the function applied to every tensor. (torch's pytree takes three times as long.)"""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([_mapped(each, function) for each in tree])
    if isinstance(tree, dict):
        return {key: _mapped(each, function) for key, each in tree.items()}
    return tree


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _is_view(func: Any) -> bool:
    return any(a.alias_info is not None and not a.alias_info.is_write for a in func._schema.returns)


@functools.cache
def _writes(func: Any) -> list[tuple[str, bool]]:
    """The arguments of an operation by name, and whether it writes them."""
    return [(a.name, a.alias_info is not None and a.alias_info.is_write) for a in func._schema.arguments]


def _accesses(func: Any, args: Any, kwargs: Any) -> list[tuple[Tensor, bool]]:
    """The tensors among an operation's arguments, and whether it writes them."""
    found = []
    for i, (name, writes) in enumerate(_writes(func)):
        value = args[i] if i < len(args) else kwargs.get(name)
        if isinstance(value, (Tensor, list, tuple)):
            found += [(t, writes) for t in tensors_in(value)]
    return found
