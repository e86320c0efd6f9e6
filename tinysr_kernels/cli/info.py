"""`tinysr info`: describe a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from tinysr_kernels.cli.terminal import print_facts
from tinysr_kernels.errors import shorten


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser("info", help="describe a checkpoint")
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the description of the checkpoint."""
    import tinysr_kernels

    print_facts(_printable(tinysr_kernels.describe(arguments.checkpoint)), arguments.json)
    return 0


def _printable(value: Any) -> Any:
    """The same facts with the control characters of every text escaped: names come from files nobody vouches for."""
    if isinstance(value, dict):
        return {_printable(name): _printable(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(one) for one in value]
    return shorten(value, 10_000) if isinstance(value, str) else value
