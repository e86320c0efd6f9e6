"""Configurations as JSON: a family's dataclass of plain values there and back, every value checked by its field.

A field's kind follows from its type and default: a Literal is a choice, a tuple a list of positive integers, an int a
positive integer, a float a positive number. `Annotated[float, Within(least, most)]` narrows a field's range, in a tuple
that of each entry. So a family writes its dataclass and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tinysr_kernels.checkpoint.structure import BLOCKS, GAIN, LEVELS, WIDTH
from tinysr_kernels.errors import CheckpointError, shorten

C = TypeVar("C")


@dataclass(frozen=True)
class Within:
    """The range of a number, both ends included, and how many numbers a list may have."""

    least: float
    most: float
    entries: int = 32


WHOLE = Within(1, WIDTH)
"""Integers, unless a field says otherwise: widths, factors, counts."""
NUMBER = Within(*GAIN)
"""Other numbers, unless a field says otherwise: gains and factors that half precision can still apply."""
Epsilon = Annotated[float, Within(1e-12, 1.0)]
"""What a normalization adds to the variance: below, float32 has nothing left of it beside a variance of zero."""
Blocks = Annotated[tuple[int, ...], Within(1, BLOCKS, entries=LEVELS)]
"""Blocks per level."""


def config_to_dict(config: Any) -> dict[str, Any]:
    """A JSON-serializable dictionary from which `config_from_values` rebuilds the configuration."""
    return asdict(config)


def config_from_values(cls: type[C], values: Mapping[str, Any]) -> C:
    """Rebuild a configuration of this class from JSON values; fields that are left out have their defaults.

    Raises ValueError naming the field when one is unknown, has the wrong type or a value outside its choices or range.
    """
    default, hints = cls(), get_type_hints(cls, include_extras=True)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # a dataclass
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown configuration field {_shown(name)}; known: {sorted(known)}")
        clean[name] = _checked(name, value, hints[name], getattr(default, name))
    return cls(**clean)


def checked_config(cls: type[C], config: Any, where: str) -> C:
    """A configuration that somebody's code made, with every field checked as if it came from a file.

    Raises CheckpointError beginning with `where`.
    """
    try:
        values = {f.name: getattr(config, f.name) for f in fields(cls)}  # type: ignore[arg-type]  # a dataclass
        return config_from_values(cls, values)
    except Exception as error:  # its class may derive from ours, and then its own code runs here
        raise CheckpointError(f"{where}: {shorten(error)}") from error


def _checked(name: str, value: Any, hint: Any, default: Any) -> Any:
    """One JSON value as its field wants it; lists become tuples."""
    allowed = None
    if get_origin(hint) is Annotated:
        hint, allowed = get_args(hint)
    if get_origin(hint) is Literal:
        if type(value) is not str or value not in get_args(hint):
            raise ValueError(f"{name} must be one of {get_args(hint)}, found {_shown(value)}")
        return value
    if isinstance(default, tuple):
        return _list(name, value, allowed or WHOLE)
    if isinstance(default, int):
        return _number(name, value, int, allowed or WHOLE)
    if isinstance(default, float):
        return _number(name, value, float, allowed or NUMBER)
    raise TypeError(f"{name}: fields are of Literal, tuple[int, ...], int or float, found {hint}")


def _list(name: str, value: Any, allowed: Within) -> tuple[int, ...]:
    if type(value) not in (list, tuple) or not 0 < len(value) <= allowed.entries:
        raise ValueError(f"{name} must be a list of 1 to {allowed.entries} integers, found {_shown(value)}")
    return tuple(_number(f"{name}[{i}]", entry, int, allowed) for i, entry in enumerate(value))


def _number(name: str, value: Any, kind: type, allowed: Within) -> Any:
    """An int is taken for a float, but nothing else for another kind: no bool, no text, no 12.0 for 12."""
    if type(value) not in (int, kind) or not allowed.least <= value <= allowed.most:  # NaN is within nothing
        noun = "an integer" if kind is int else "a number"
        raise ValueError(f"{name} must be {noun} from {allowed.least:g} to {allowed.most:g}, found {_shown(value)}")
    return kind(value)


def _shown(value: Any) -> str:
    """For messages: a hostile value may be megabytes long."""
    if type(value) in (list, tuple) and len(value) > 100:
        return f"{len(value)} entries"
    return shorten(repr(value) if type(value) is str else value, 80)
