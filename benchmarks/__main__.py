"""`python -m benchmarks COMMAND`: see each command's --help."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

COMMANDS = {
    "plan": "static.plan",
    "static": "static.static",
    "pages": "static.generate_docs",
    "predict": "commands.predict",
    "ceilings": "commands.ceilings",
    "correctness": "commands.correctness",
    "micro": "commands.micro",
    "e2e": "commands.e2e",
    "quality": "commands.quality",
    "soak": "commands.soak",
    "report": "reports.report",
    "all": "commands.everything",
    "cpu": "commands.cpu",
}
"""Modules of benchmarks/ with SUMMARY, add_arguments and main. What only one of them needs, it imports when it runs."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a file that cannot be used, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure kernels and networks.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        command = importlib.import_module(f"benchmarks.{module}")
        command.add_arguments(commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY))
        commands.choices[name].set_defaults(run=command.main)
    options = parser.parse_args(arguments)
    from benchmarks.measure.timing import BelowFloor
    from tinysr_kernels.launch.json_file import BadFile

    try:
        return options.run(options)
    except BelowFloor as error:
        print(f"benchmarks {options.command}: {error}; the measurement is wrong", file=sys.stderr)
        return 1
    except (BadFile, OSError) as error:
        print(f"benchmarks {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    # What is measured is the kernels: a failing one shall fail its measurement, not be replaced by the reference.
    os.environ.setdefault("TINYSR_LAUNCH_GUARD", "0")
    sys.exit(main())
