"""`python -m autotune COMMAND`; each command has --help."""

from __future__ import annotations

import argparse
import io
import signal
import sys

from autotune.commands import check, predict, run, show
from autotune.device.worker import WorkerStartError
from tinysr_kernels.errors import TinySRError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code: 2 for a request that cannot be served, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m autotune", description="Find the fastest launch configurations.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in (("run", run), ("check", check), ("predict", predict), ("show", show)):
        command.add_arguments(commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY))
        commands.choices[name].set_defaults(run=command.main)
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):  # a folder's name may have what the encoding lacks
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        return options.run(options)
    except (TinySRError, WorkerStartError, ValueError, OSError) as error:
        print(f"autotune: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("autotune: interrupted; run the same command again to resume", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
