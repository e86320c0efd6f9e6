"""`python -m benchmarks COMMAND`: see each command's --help."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks import ceilings, correctness, cpu, e2e, everything, micro, pages, plan, quality, report, static
from benchmarks.timing import BelowFloor

COMMANDS: dict[str, Any] = {
    "plan": plan,
    "static": static,
    "pages": pages,
    "ceilings": ceilings,
    "micro": micro,
    "e2e": e2e,
    "quality": quality,
    "correctness": correctness,
    "report": report,
    "all": everything,
    "cpu": cpu,
}
"""Modules with SUMMARY, add_arguments and main."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure kernels and networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY))
        commands.choices[name].set_defaults(run=command.main)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except BelowFloor as error:
        print(f"benchmarks {options.command}: {error}; the measurement is wrong", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
