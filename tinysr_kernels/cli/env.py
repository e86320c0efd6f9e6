"""`tinysr env`: what a bug report needs to know of this machine."""

from __future__ import annotations

import argparse
from typing import Any

from tinysr_kernels.cli.terminal import print_facts


def add_parser(commands: Any) -> None:
    """Add the sub-command to the subparsers of `argparse`."""
    parser = commands.add_parser("env", help="what a bug report needs to know of this machine")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print versions, devices and settings."""
    from tinysr_kernels.runtime.environment import environment

    print_facts(environment(), arguments.json)
    return 0
