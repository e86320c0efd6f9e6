"""`tinysr env`: versions, devices and settings for bug reports."""

from __future__ import annotations

import argparse
from typing import Any

from tinysr_kernels.cli.terminal import print_facts


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser("env", help="print versions, devices and settings for bug reports")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices and settings."""
    from tinysr_kernels.runtime.environment import environment

    print_facts(environment(), arguments.json)
    return 0
