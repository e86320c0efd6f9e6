"""A pickle as torch.save writes it, interpreted instead of executed: descriptions of tensors between plain values.

torch.load with weights_only keeps a pickle from running code and bounds nothing else: `bytearray(N)` takes N bytes,
a tuple of tuples of tuples as a key hashes for ever, and a tensor may claim bytes that are not its own. This machine
takes the opcodes that torch.save writes, one bounded step each, and calls nothing that a pickle names: the functions
that rebuild a tensor become a `StoredTensor`, everything else that weights_only would call becomes an `Inert`, and
whatever weights_only refuses raises `Refused`. It builds no tensor; `torch_file` does.

Opcodes: Python's Lib/pickletools.py; which of them: torch/_weights_only_unpickler.py.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tinysr_kernels.checkpoint.read.stored import (
    Global,
    Inert,
    Malformed,
    Refused,
    Storage,
    called,
    is_allowed,
    kind_of,
    storage_of,
)

SIZE_LIMIT = 64 * 2**20  # bytes of one pickle: 50,000 tensors have 10 MB
STEPS_LIMIT = 2_000_000  # opcodes and copied pairs: 50,000 tensors; some seconds and 200 MB


Data = bytes | mmap.mmap


@dataclass(frozen=True)
class Interpreted:
    """A pickle's value, the storages it speaks of by their keys, and where the pickle ends.

    The value is made of dict (keys are str or int), list, tuple, str, int, float, bool, None, StoredTensor and Inert.
    Lists and dicts may contain themselves: never walk them to their end, compare or print them.
    """

    value: Any
    storages: dict[str, Storage]
    end: int


def interpret(data: Data, start: int = 0) -> Interpreted:
    """The pickle that starts at an offset. Raises Refused and Malformed."""
    machine, reader = _Machine(), _Reader(data, start)
    try:
        for opcode, argument, _ in pickletools.genops(reader):  # type: ignore[arg-type]
            machine.step(opcode.name, argument)
        return Interpreted(machine.stack.pop(), machine.storages, reader.position)
    except (Malformed, Refused):
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:  # of pickletools, or a pop too many
        raise Malformed(f"{type(error).__name__}: {error}") from error


class _Reader:
    """At most SIZE_LIMIT bytes of the data, read as `pickletools` reads a file."""

    def __init__(self, data: Data, start: int) -> None:
        self._data = data
        self.position = start
        self._end = min(start + SIZE_LIMIT, len(data))

    def read(self, count: int) -> bytes:
        if count > self._end - self.position:
            raise Malformed(f"{count} bytes expected past its end, or more than {SIZE_LIMIT} besides the tensors' own")
        self.position += count
        return self._data[self.position - count : self.position]

    def readline(self) -> bytes:
        found = self._data.find(b"\n", self.position, self._end)
        return self.read((self._end if found < 0 else found + 1) - self.position)


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.storages: dict[str, Storage] = {}
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def step(self, name: str, argument: Any) -> None:
        self._spend(1)
        if name in _PUSH:
            self.stack.append(_PUSH[name](argument))
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise Malformed(f"the opcode {name}, which torch.save does not write")

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > STEPS_LIMIT:
            raise Malformed(f"more than {STEPS_LIMIT} steps")

    # ------------------------------------------------------------------------------ stack and memo
    def nothing(self, _: Any) -> None:
        """PROTO: any, for the opcodes are looked at one by one. STOP: the value is the last on the stack."""

    def mark(self, _: Any) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self._below.pop()
        return items

    def get(self, number: int) -> None:
        self.stack.append(self._memo[number])

    def put(self, number: int) -> None:
        self._memo[number] = self.stack[-1]

    def to_tuple(self, _: Any) -> None:
        items = tuple(self._to_mark())
        self.stack.append(items)

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise Malformed("a tuple of too few values")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    # ------------------------------------------------------------------------------ lists and dicts
    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def appends(self, _: Any) -> None:
        items = self._to_mark()
        self._extend(items)

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not list:
            raise Malformed(f"an element for {kind_of(target)}")
        target.extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def set_items(self, _: Any) -> None:
        items = self._to_mark()
        self._update(items)

    def _update(self, items: list[Any]) -> None:
        """Keys and values in turn. A key's hash is that of a text or of a small number: it takes a known time."""
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise Malformed(f"keys and values for {kind_of(target)}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str and not (type(key) in (int, bool) and abs(key) < 2**60):
                raise Malformed(f"a dict with {kind_of(key)} as a key, expected texts or numbers")
            if key in target:
                raise Malformed(f"a dict with the key {str(key)[:100]!r} twice")
            target[key] = value

    # ------------------------------------------------------------------- names, calls and storages
    def find(self, argument: str) -> None:
        name = argument.replace(" ", ".").replace("__builtin__.", "builtins.", 1)
        if not is_allowed(name):
            raise Refused(name)
        self.stack.append(Global(name))

    def call(self, _: Any) -> None:
        """REDUCE and NEWOBJ."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if type(function) is not Global or type(arguments) is not tuple:
            raise Malformed(f"a call of {kind_of(function)}")
        if function.name == "collections.OrderedDict":
            self.stack.append({})
            self._fill(arguments)
        else:
            self.stack.append(called(function.name, arguments))

    def _fill(self, arguments: Any) -> None:
        """An OrderedDict of pairs, as Python 2 wrote them."""
        for pair in arguments[0] if arguments and type(arguments[0]) in (list, tuple) else ():
            self._spend(1)
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise Malformed("an OrderedDict of something else than pairs")
            self._update(list(pair))

    def build(self, _: Any) -> None:
        """Attributes of an object: of no use here (an OrderedDict's `_metadata`)."""
        self.stack.pop()
        if type(self.stack[-1]) not in (dict, Inert):
            raise Malformed(f"attributes for {kind_of(self.stack[-1])}")

    def storage(self, _: Any) -> None:
        made = storage_of(self.stack.pop())
        known = self.storages.setdefault(made.key, made)
        if made.numel and (known.dtype, known.numel) != (made.dtype, made.numel):
            raise Malformed(f"the storage {made.key[:100]!r} described twice, and differently")
        self.stack.append(made)


def _same(argument: Any) -> Any:
    return argument


_PUSH: dict[str, Callable[[Any], Any]] = {
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    "EMPTY_TUPLE": lambda _: (),
    "EMPTY_LIST": lambda _: [],
    "EMPTY_DICT": lambda _: {},
    "EMPTY_SET": lambda _: Inert("set"),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"), _same),
}
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.nothing,
    "STOP": _Machine.nothing,
    "MARK": _Machine.mark,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "TUPLE": _Machine.to_tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.find,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
