"""The exception types of the package. Every message names what was found and states the remedy."""

from __future__ import annotations


class TinySRError(Exception):
    """Base class of all errors that the package raises deliberately."""


class CheckpointError(TinySRError):
    """A checkpoint cannot be used. The message names the file, the key, what was expected and what was found."""


class InputError(TinySRError, ValueError):
    """An image or argument is not accepted."""


class OutOfMemory(TinySRError, MemoryError):
    """The smallest unit of work does not fit into memory. The message states the needed and the free amount."""


class NonFiniteOutput(TinySRError, ArithmeticError):
    """The network's output contains NaN or infinity, also in the widest dtype tried."""
