"""`python -m benchmarks COMMAND`: see each command's --help."""

from __future__ import annotations

import argparse
import sys

from benchmarks import static


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure kernels and networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    static.add_arguments(commands.add_parser("static", help=static.SUMMARY, description=static.SUMMARY))
    options = parser.parse_args(arguments)
    return static.main(options)


if __name__ == "__main__":
    sys.exit(main())
