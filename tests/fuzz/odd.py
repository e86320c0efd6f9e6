"""Odd things: values, tensors and objects that no caller should hand over, and some that he may."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 64, 2_000_000, 2**31 - 1, 2**63, 10**400, 1e308, 1e-308, -1e-5, 1e-6, 0.5, 12.0, math.nan,
    math.inf, True, False, None, "4", "", "\x1b[2J" * 50, [], {}, [1], [1, 3, 3, 3], [2147483647], [0], [True], [1.0],
    [1] * 50, [1] * 100_000, [[1]], {"a": 1},
)  # fmt: skip


class Liar:
    """Answers to `get`, `detach` and `numel`, and claims another class."""

    def __init__(self, kind: type) -> None:
        self._kind = kind

    @property
    def __class__(self) -> Any:
        return self._kind

    def get(self, *_: object) -> Any:
        raise ZeroDivisionError

    detach = numel = cpu = keys = items = state_dict = __fspath__ = get


class Hostile:
    """Raises whatever it is asked."""

    def __getattribute__(self, name: str) -> Any:
        raise OSError(name)

    def __repr__(self) -> str:
        raise ValueError

    def __eq__(self, other: object) -> bool:
        raise ArithmeticError

    __hash__ = object.__hash__


class BadPath:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __fspath__(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class BadMapping(Mapping[str, Any]):
    """Claims a length and raises when it is looked through, or has no end."""

    def __init__(self, endless: bool) -> None:
        self.endless = endless

    def __len__(self) -> int:
        return 10**9 if self.endless else 2

    def __getitem__(self, name: str) -> Any:
        raise RuntimeError("no such thing")

    def __iter__(self) -> Iterator[str]:
        while True:
            yield "a"


class OddModule(nn.Module):
    """A module whose `config`, state dict or construction is wrong."""

    def __init__(self, fault: str) -> None:
        if fault != "uninitialized":
            super().__init__()
            self.__dict__["fault"] = fault
        if fault == "itself":
            self.part = nn.Linear(2, 2)
            self.part.whole = self

    @property
    def config(self) -> Any:
        if self.__dict__.get("fault") == "config":
            raise KeyError("config")
        return {1: 2} if self.__dict__.get("fault") == "keys" else {"patch_size": Hostile()}

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        answers: dict[str, Any] = {"list": [1, 2], "names": {1: torch.ones(1)}, "none": None, "extra": {"a": Hostile()}}
        fault = self.__dict__.get("fault", "")
        if fault == "raises":
            raise LookupError("state")
        return answers[fault] if fault in answers else super().state_dict(*arguments, **options)


class Sub(Tensor):
    """A subclass whose methods lie."""

    @property
    def shape(self) -> Any:
        raise NotImplementedError

    def detach(self) -> Any:
        return 3


def itself(kind: type) -> Any:
    """A list, or a dict, that contains itself."""
    made: Any = kind()
    if kind is list:
        made.extend([made, made])
    else:
        made["a"] = made
    return made


def _freed(tensor: Tensor) -> Tensor:
    made = tensor.clone()
    made.untyped_storage().resize_(0)
    return made


def _fake(tensor: Tensor) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(tensor)


def _with(tensor: Tensor, value: float) -> Tensor:
    made = tensor.clone().float()
    made.view(-1)[made.numel() // 2 : made.numel() // 2 + 1] = value
    return made


def _own(tensor: Tensor) -> Tensor:
    made = tensor.clone()
    made.detach = made.cpu = Hostile()  # type: ignore[method-assign,assignment]
    return made


TENSORS: tuple[Callable[[Tensor], Any], ...] = (
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.reshape(1, -1).to_sparse_csr(),
    lambda t: torch.nested.nested_tensor([t, t]),
    lambda t: torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]], layout=torch.jagged),
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.complex64).conj().imag,
    lambda t: t.to(torch.int32),
    lambda t: t > 0,
    lambda t: t.to(torch.float8_e4m3fn),
    lambda t: torch.ones(()).expand(10**6, 10**6),
    lambda t: torch.zeros(()).expand(t.shape),
    lambda t: t.flatten(),
    lambda t: t[None],
    lambda t: t.flatten()[0],
    lambda t: t[:0],
    lambda t: t[:-1],
    lambda t: torch.cat([t, t]),
    lambda t: t.mT if t.dim() > 1 else t,
    lambda t: t.clone().mT.contiguous().mT if t.dim() > 1 else t,
    lambda t: _with(t, math.nan),
    lambda t: _with(t, math.inf),
    lambda t: _with(t, 1e30),
    lambda t: t * 1e5,
    lambda t: t.double() * 1e300,
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.clone().requires_grad_(),
    lambda t: nn.Parameter(t.clone().float()),
    lambda t: t.as_subclass(Sub),
    lambda t: nn.UninitializedParameter(),
    lambda t: torch._efficientzerotensor(t.shape),
    _freed,
    _fake,
    _own,
)


def odd_tensor(draw: random.Random, tensor: Tensor) -> Any:
    """The tensor changed, or something in its place."""
    if draw.random() < 0.1:
        return odd_object(draw)
    try:
        return draw.choice(TENSORS)(tensor)
    except (RuntimeError, IndexError):  # an empty one cannot be changed in every way
        return tensor


OBJECTS: tuple[Callable[[], Any], ...] = (
    object, Hostile, dict, list, int, float, complex, bytes, set, nn.Module, lambda: None, lambda: Tensor,
    lambda: nn.Module, lambda: "", lambda: "demo", lambda: "\0", lambda: "x" * 10_000, lambda: "~nobody/x",
    lambda: "missing\x1b[2J.safetensors", lambda: "caf\udce9.pt", lambda: b"demo", lambda: 3, lambda: True,
    lambda: math.nan, lambda: itself(list), lambda: itself(dict), lambda: [[[[1]]]], lambda: torch.ones(3),
    lambda: [torch.ones(1, 4)], lambda: {"temb": torch.ones(1, 4)}, lambda: {3: torch.ones(1)}, lambda: np.ones(3),
    lambda: np.array("demo"), lambda: Liar(Tensor), lambda: Liar(nn.Module), lambda: Liar(dict), lambda: Liar(str),
    lambda: BadPath(3), lambda: BadPath(b"x"), lambda: BadPath(OSError("no")), lambda: BadPath("demo"),
    lambda: BadMapping(False), lambda: BadMapping(True), lambda: iter([1]), lambda: nn.Linear(2, 2), lambda: range(3),
    *(lambda fault=fault: OddModule(fault)  # type: ignore[misc]
      for fault in ("config", "keys", "list", "names", "none", "extra", "raises", "uninitialized", "itself")),
)  # fmt: skip


def odd_object(draw: random.Random) -> Any:
    """Something that is no tensor, or a tensor where none is wanted."""
    return draw.choice(OBJECTS)()
