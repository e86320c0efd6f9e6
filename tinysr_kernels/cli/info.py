"""`tinysr info`: describe a checkpoint."""

from __future__ import annotations

import argparse
from typing import Any

from tinysr_kernels.cli.terminal import print_facts


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser("info", help="describe a checkpoint")
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the description of the checkpoint."""
    import tinysr_kernels

    print_facts(tinysr_kernels.describe(arguments.checkpoint), arguments.json)
    return 0
