"""The command `tinysr`: upscale files, folders and videos; describe and convert checkpoints; describe the machine.

Exit codes: 0 all inputs done; 1 some inputs failed, each is named and the others are written; 2 wrong usage or an
unusable checkpoint; 130 after Ctrl-C and 143 after SIGTERM, without partial files.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from tinysr_kernels._version import __version__
from tinysr_kernels.cli import convert, env, info, upscale
from tinysr_kernels.cli.terminal import say
from tinysr_kernels.errors import TinySRError

SUBCOMMANDS = (upscale, info, convert, env)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinysr", description="One-step diffusion super-resolution of images and videos."
    )
    parser.add_argument("--version", action="version", version=f"tinysr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(commands)
    return parser


def _terminate(signum: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments (default: those of the process) and return its exit code."""
    arguments = _parser().parse_args(argv)
    previous = None
    with suppress(ValueError):  # not in the main thread: signals are left to the caller
        previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return arguments.command(arguments)
    except TinySRError as error:
        say(f"tinysr: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("tinysr: interrupted; finished results are complete, resume with --skip-existing")
        return 130
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BrokenPipeError:  # stdout was closed by its reader, as in `tinysr info x | head`
        sys.stderr.close()
        return 1
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
