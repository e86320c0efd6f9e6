"""The recipe's commands: `python -m model.compress masks-proof --help`."""

from __future__ import annotations

import argparse
import sys

from model.compress.masks import command


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.compress", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command.add_to(commands)
    args = parser.parse_args(arguments)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
