"""Shared by the subcommands: argument types, and printing that neither fails nor obeys what it prints.

Names and messages may hold anything. What is not printable (control characters and escape sequences, changes of the
writing direction, bytes that are not in the stream's encoding) is escaped before it reaches a stream, each message in
one line. A stream that is absent, closed or full is left alone from then on: printing never decides about the work.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from contextlib import suppress
from typing import Any, NoReturn, TextIO

from tinysr_kernels.errors import shorten

DTYPES = ("float16", "bfloat16", "float32", "float64")
BACKENDS = ("auto", "triton", "library", "reference")

_LONGEST = 8000  # characters of one line: a path of Linux, escaped
_given_up: list[TextIO] = []


class Parser(argparse.ArgumentParser):
    """argparse, with arguments escaped in its messages: a wildcard may have put any file's name there."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, exit with 2."""
        write(sys.stderr, self.format_usage())
        write(sys.stderr, f"{self.prog}: error: {printable(message)}\n")
        raise SystemExit(2)

    def _print_message(self, message: str, file: Any = None) -> None:
        write(file or sys.stderr, message)


def integer_between(least: int, most: int | None = None) -> Any:
    """An argparse type: an integer from `least` to `most` (None: unbounded), both inclusive."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"expected an integer {limits}, found {value}")
        return value

    return integer


def number(text: str) -> float:
    """An argparse type: a number such as 1.5; "2x" and "150%" are not."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number such as 1.5, found {text[:40]!r}") from error


def width_height(text: str) -> tuple[int, int]:
    """An argparse type: WIDTHxHEIGHT in pixels."""
    match = re.fullmatch(r"([0-9]{1,9})[xX]([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1920x1080, found {text[:40]!r}")
    return int(match[1]), int(match[2])


def printable(message: object) -> str:
    """The message in one line, with everything escaped that is not printable."""
    return shorten(message, _LONGEST)


def fill_standard_streams() -> None:
    """Open closed standard streams on the null device, so that no result becomes file descriptor 2.

    Libraries write their warnings to that number, whatever file has it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads the stream."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def write(stream: TextIO | None, text: str) -> bool:
    """Write and flush -> whether that succeeded. After the first failure a stream is not written to again."""
    if stream is None or stream in _given_up:
        return False
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # a full disk, a reader that has gone, a closed file
        _give_up(stream)
        return False
    return True


def _give_up(stream: TextIO) -> None:
    """Leave a stream alone. What it still holds would fail again when Python ends, and change the exit code."""
    _given_up.append(stream)
    with suppress(OSError, ValueError, AttributeError):
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)


def _print(stream: TextIO | None, message: object) -> bool:
    """Print one line, above the progress bars if there are any."""
    line = printable(message) + "\n"
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or not is_terminal(sys.stderr):
        return write(stream, line)
    with tqdm.tqdm.external_write_mode(file=stream):
        return write(stream, line)


def say(message: object) -> None:
    """Print a line to stderr."""
    _print(sys.stderr, message)


def put(message: object) -> bool:
    """Print a line to stdout -> whether that succeeded."""
    return _print(sys.stdout, message)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print `key  value` lines, with one line per entry of a list, or JSON. Raises OSError if stdout cannot take it."""
    if as_json:
        lines = json.dumps(facts, indent=2, default=str).split("\n")
    else:
        lines = _lines(facts)
    for line in lines:
        if not put(line):
            raise OSError("the output could not be written")


def _lines(facts: dict[str, Any]) -> list[str]:
    lines = []
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = [f"{name} = {part}" for name, part in value.items()]
        parts = value if isinstance(value, (list, tuple)) else [value]
        lines += [f"{key if index == 0 else '':<{width}}  {part}" for index, part in enumerate(parts or ["none"])]
    return lines
