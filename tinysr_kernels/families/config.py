"""Configurations as JSON: a family's dataclass of plain values there and back, every value checked by its field.

A field's kind follows from its type and default: a Literal is a choice, a tuple a list of positive integers, an int a
positive integer, a float a positive finite number. So a family writes its dataclass and nothing else.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

C = TypeVar("C")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A JSON-serializable dictionary from which `config_from_values` rebuilds the configuration."""
    return asdict(config)


def config_from_values(cls: type[C], values: dict[str, Any]) -> C:
    """Rebuild a configuration of this class from JSON values; fields that are left out have their defaults.

    Raises ValueError naming the field when one is unknown, has the wrong type or a value outside its choices.
    """
    default, hints = cls(), get_type_hints(cls)
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # a dataclass
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown configuration field {name!r}; known: {sorted(known)}")
        clean[name] = _checked(name, value, hints[name], getattr(default, name))
    return cls(**clean)


def _checked(name: str, value: Any, hint: Any, default: Any) -> Any:
    """One JSON value as its field wants it; lists become tuples."""
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {get_args(hint)}, found {value!r}")
        return value
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or not value or not all(_positive_int(v) for v in value):
            raise ValueError(f"{name} must be a list of positive integers, found {value!r}")
        return tuple(value)
    if isinstance(default, int):
        if not _positive_int(value):
            raise ValueError(f"{name} must be a positive integer, found {value!r}")
        return value
    if isinstance(default, float):
        # the largest float, not infinity: JSON has integers beyond both
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
            raise ValueError(f"{name} must be a positive finite number, found {value!r}")
        return float(value)
    raise TypeError(f"{name}: fields are of Literal, tuple[int, ...], int or float, found {hint}")


def _positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
