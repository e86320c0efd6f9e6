"""An operator as a class: its fields are the call, its methods are what can be asked of a call.

    @register
    @dataclass(slots=True, eq=False)
    class TanhScaled(Operator):
        name = "tanh_scaled"
        z: Tensor
        gain: float

The fields are written once. The schema of `torch.ops.tinysr.<name>` follows from them, so does the way a call is bound;
kernels alone take flat argument lists, because Triton wants them so. An instance is one call on tensors of any device,
the meta device included. `REGISTRY` lists the classes by name: benchmarks, tuning, counting and tests walk it.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tinysr_kernels.launch import configs, guard
from tinysr_kernels.launch.backend import kernels_run_on, libraries_run_on
from tinysr_kernels.launch.device import MINIMUM_CAPABILITY, Gpu, gpu_of, has_bfloat16
from tinysr_kernels.launch.plan import Plan

LIBRARY = torch.library.Library("tinysr", "DEF")
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "int",
    float: "float",
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}


@dataclass(frozen=True)
class Cost:
    """The least work of one call.

    flops: multiplications and additions counted separately (one multiply-add is 2); bytes: each distinct input read
    once and each output written once, at their own dtypes.
    """

    flops: int
    bytes: int


class Operator:
    """A call of a fused operator; subclasses are dataclasses whose first field is a tensor.

    name: of `torch.ops.tinysr.<name>`. config: the frozen dataclass of its launch configurations (ints, strings and
    bools only). tuned_by: the fields that `bucket` and `heuristic` read; of tensors they may read shape and dtype.
    returns: the schema's result. dtypes: the floating dtypes that kernels and libraries read and write. capability: the
    lowest compute capability that the kernels run on.
    """

    __slots__ = ()

    name: ClassVar[str]
    config: ClassVar[type]
    tuned_by: ClassVar[tuple[str, ...]]
    returns: ClassVar[str] = "Tensor"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = KERNEL_DTYPES
    capability: ClassVar[tuple[int, int]] = MINIMUM_CAPABILITY

    # What an operator defines.

    def check(self) -> None:
        """Raise ValueError, naming argument, expected and found, unless the arguments fit each other."""
        raise NotImplementedError

    def reference(self) -> Any:
        """The result in plain PyTorch, computed in float32 or wider, for any floating dtype and any device."""
        raise NotImplementedError

    def library(self) -> Any:
        """The result by calls of PyTorch's libraries in the compute dtype, for any of `dtypes` and any device.

        No float32 copy of an activation, no tensor made from host data, no synchronization: a CUDA graph can capture
        it. An operator that takes little of a network's time, or whose precision counts (the last step to the image),
        leaves this to its reference.
        """
        return self.reference()

    def empty(self) -> Any:
        """An uninitialized result of the true shape, dtype, strides and device."""
        raise NotImplementedError

    def cost(self) -> Cost:
        """FLOPs and bytes of the call."""
        raise NotImplementedError

    def bucket(self) -> str:
        """A short text; calls of equal text share a launch configuration."""
        raise NotImplementedError

    def heuristic(self, gpu: Gpu) -> Any:
        """A configuration that compiles on every GPU and spills no registers."""
        raise NotImplementedError

    def plan(self, config: Any) -> Plan:
        """The launches of the call, not run; inputs that are not dense in their layout are copied once.

        ValueError for a configuration that cannot serve the call.
        """
        raise NotImplementedError

    def space(self, gpu: Gpu) -> Iterator[Any]:
        """The configurations worth measuring, repetitions allowed, among them every form that applies."""
        raise NotImplementedError

    # What follows from that.

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """Names of the arguments, in the schema's order."""
        names = _FIELDS.get(cls)
        if names is None:
            names = _FIELDS[cls] = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        return names

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments by name, in the schema's order."""
        return {name: getattr(self, name) for name in self.fields()}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors among the arguments."""
        return tuple(v for v in self.arguments.values() if isinstance(v, Tensor))

    @property
    def first(self) -> Tensor:
        """The first argument, whose device and dtype stand for the call's."""
        first: Tensor = getattr(self, self.fields()[0])
        return first

    @property
    def kernels_apply(self) -> bool:
        """Whether kernels or libraries compute this call: dtypes that they take, nothing empty, all on one device."""
        tensors = self.tensors
        return all(t.numel() > 0 and t.device == tensors[0].device for t in tensors) and all(
            dtype in self.dtypes or not dtype.is_floating_point for dtype in self._computed_in()
        )

    @property
    def library_applies(self) -> bool:
        """Whether libraries compute this call: as `kernels_apply`, and bfloat16 only where the device has it."""
        return self.kernels_apply and (torch.bfloat16 not in self._computed_in() or has_bfloat16(self.first.device))

    def _computed_in(self) -> list[torch.dtype]:
        """The dtypes among the arguments and those of the tensors."""
        values = self.arguments.values()
        return [v if isinstance(v, torch.dtype) else v.dtype for v in values if isinstance(v, (torch.dtype, Tensor))]

    def on_meta(self) -> Operator:
        """The same call on tensors without data."""
        moved = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in self.arguments.items()}
        return type(self)(**moved)

    def lookup_key(self) -> tuple[Any, ...]:
        """What `bucket` and `heuristic` depend on, hashable; calls of equal keys get the same configuration."""
        values = [getattr(self, name) for name in self.tuned_by]
        return tuple([(v.shape, v.dtype) if isinstance(v, Tensor) else v for v in values])

    def choose(self, gpu: Gpu) -> configs.Choice:
        """The launch configuration for this call on a GPU, and where it came from.

        ValueError if the kernels do not run on this GPU.
        """
        if gpu.capability < self.capability:
            found, wanted = (".".join(map(str, c)) for c in (gpu.capability, self.capability))
            raise ValueError(f"{self.name} needs compute capability {wanted}, {gpu.name} has {found}")
        return configs.choose(self, gpu, REGISTRY)

    def planned(self) -> tuple[Plan, configs.Choice]:
        """The launches for the GPU that the tensors lie on (or the one assumed), and their configuration.

        Raises what `check` and `choose` raise.
        """
        self.check()
        choice = self.choose(gpu_of(self.first))
        return self.plan(choice.config), choice

    def compute(self) -> Any:
        """The result, by kernels or libraries where the backend and the dtypes allow it, else by the reference."""
        device = self.first.device
        kernels = kernels_run_on(device)
        if kernels and self.kernels_apply and not self._is_barred:
            try:
                return self.planned()[0].run(configs.pdl(gpu_of(self.first)))
            except Exception as error:  # noqa: BLE001  the guard raises what is not the kernels' failure
                guard.bar(self.name, device, self.bucket(), error)
        self.check()
        return self.library() if (kernels or libraries_run_on(device)) and self.library_applies else self.reference()

    @property
    def _is_barred(self) -> bool:
        """Whether the kernels failed before (launch/guard.py); without any failure it costs nothing."""
        return guard.anything_barred() and guard.is_barred(self.name, self.first.device, self.bucket())

    @classmethod
    def overload(cls) -> Any:
        """The callable `torch.ops.tinysr.<name>.default`: a call through the dispatcher."""
        return getattr(torch.ops.tinysr, cls.name).default


REGISTRY: dict[str, type[Operator]] = {}
_FIELDS: dict[type, tuple[str, ...]] = {}
"""Cached, because every call asks for them."""


T = typing.TypeVar("T", bound=Operator)


def register(cls: type[T]) -> type[T]:
    """Define `torch.ops.tinysr.<name>` with the schema of the class's fields, and enter the class in REGISTRY."""
    LIBRARY.define(schema(cls))
    LIBRARY.impl(cls.name, _implementation(cls), "CompositeExplicitAutograd")
    torch.library.register_fake(f"tinysr::{cls.name}", _fake(cls), lib=LIBRARY)
    REGISTRY[cls.name] = cls
    return cls


def schema(cls: type[Operator]) -> str:
    """The schema of `torch.library` that the fields, their types and their defaults say."""
    types = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    words = [_word(f, types) for f in fields if not f.kw_only]
    keywords = [_word(f, types) for f in fields if f.kw_only]
    return f"{cls.name}({', '.join([*words, *(['*'] if keywords else []), *keywords])}) -> {cls.returns}"


def _word(field: dataclasses.Field[Any], types: dict[str, Any]) -> str:
    word = f"{SCHEMA_TYPES[types[field.name]]} {field.name}"
    if field.default is dataclasses.MISSING:
        return word
    return f'{word}="{field.default}"' if isinstance(field.default, str) else f"{word}={field.default}"


def _implementation(cls: type[Operator]) -> Callable[..., Any]:
    # Autocast stays active inside an operator: it would turn the reference's float32 matmuls into bfloat16.
    def run(first: Tensor, *rest: Any, **keywords: Any) -> Any:
        device = first.device.type
        call = cls(first, *rest, **keywords)  # type: ignore[call-arg]
        if not torch.is_autocast_enabled(device):
            return call.compute()
        with torch.autocast(device, enabled=False):
            return call.compute()

    return run


def _fake(cls: type[Operator]) -> Callable[..., Any]:
    def fake(*args: Any, **kwargs: Any) -> Any:
        call = cls(*args, **kwargs)
        call.check()
        return call.empty()

    return fake
