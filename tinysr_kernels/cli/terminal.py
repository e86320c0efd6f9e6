"""Shared by the subcommands: argument types and printing."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

DTYPES = ("float16", "bfloat16", "float32", "float64")


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


def say(message: str) -> None:
    """Print to stderr without breaking a progress bar."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        tqdm.tqdm.write(message, file=sys.stderr)
    else:
        print(message, file=sys.stderr)


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """Print `key  value` lines, with one line per entry of a list, or JSON."""
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        return
    width = max(map(len, facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            value = [f"{name} = {part}" for name, part in value.items()]
        lines = value if isinstance(value, (list, tuple)) else [value]
        for index, line in enumerate(lines or ["none"]):
            print(f"{key if index == 0 else '':<{width}}  {line}")
