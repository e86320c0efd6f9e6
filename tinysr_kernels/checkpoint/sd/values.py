"""Values of diffusers' configuration files, each checked by its name; an absent one has diffusers' default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tinysr_kernels.checkpoint.read.text import quoted
from tinysr_kernels.checkpoint.structure import WIDTH
from tinysr_kernels.errors import CheckpointError


@dataclass(frozen=True)
class Values:
    """A configuration's values, and the file that they came from for messages."""

    values: Mapping[str, Any]
    where: str

    def refuse(self, name: str, expected: str) -> CheckpointError:
        """The error for a value that is not as expected."""
        return CheckpointError(f"{self.where}: {name}: expected {expected}, found {quoted(self.values.get(name))}")

    def whole(self, name: str, default: int, most: int = WIDTH) -> int:
        """A whole number from 1 to `most`."""
        value = self.values.get(name, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.refuse(name, f"a whole number from 1 to {most}")
        return value

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number within a range, both ends included."""
        value = self.values.get(name, default)
        if type(value) not in (int, float) or not least <= value <= most:  # NaN is within nothing
            raise self.refuse(name, f"a number from {least:g} to {most:g}")
        return float(value)

    def wholes(self, name: str, default: Sequence[int], most: int) -> tuple[int, ...]:
        """A list of at most `most` whole numbers from 1 to WIDTH."""
        value = self.values.get(name, list(default))
        fits = type(value) in (list, tuple) and 1 <= len(value) <= most
        if not fits or not all(type(one) is int and 1 <= one <= WIDTH for one in value):
            raise self.refuse(name, f"a list of 1 to {most} whole numbers from 1 to {WIDTH}")
        return tuple(value)

    def each(self, name: str, default: int, count: int) -> tuple[int, ...]:
        """A whole number for all of `count` levels, or a list with one for each."""
        value = self.values.get(name, default)
        if type(value) in (list, tuple):
            found = self.wholes(name, (default,), count)
            if len(found) != count:
                raise self.refuse(name, f"a number for each of {count} levels")
            return found
        return (self.whole(name, default),) * count

    def only(self, allowed: Mapping[str, tuple[Any, ...]]) -> None:
        """CheckpointError for a value that is there and is none of those allowed; what is allowed may be a default."""
        for name, choices in allowed.items():
            value = self.values.get(name, choices[0])
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                raise self.refuse(name, " or ".join(quoted(choice) for choice in choices))
