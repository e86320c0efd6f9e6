"""The typed errors of the package. Every message names what was found and holds the remedy."""

from __future__ import annotations


class TinySRError(Exception):
    """Base of every error this package raises on purpose."""


class CheckpointError(TinySRError):
    """A checkpoint that cannot be used: names the file, the key, what was expected and what was found."""


class InputError(TinySRError, ValueError):
    """An image or an argument outside the documented accept list."""


class OutOfMemory(TinySRError, MemoryError):
    """The smallest possible unit of work does not fit; the message states needed and free bytes."""


class NonFiniteOutput(TinySRError, ArithmeticError):
    """The network produced NaN or infinity, in the widest precision tried."""
