"""`python -m benchmarks COMMAND`: see each command's --help."""

from __future__ import annotations

import argparse
import sys

from benchmarks import ceilings, cpu, micro, pages, plan, static


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure kernels and networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in (
        ("plan", plan),
        ("static", static),
        ("pages", pages),
        ("cpu", cpu),
        ("ceilings", ceilings),
        ("micro", micro),
    ):
        command.add_arguments(commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY))
        commands.choices[name].set_defaults(run=command.main)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
