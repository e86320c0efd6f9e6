"""The command `tinysr`: upscale files, folders and videos; describe and convert checkpoints; describe the machine.

Exit codes: 0 all inputs done; 1 some inputs failed, each is named and the others are written; 2 wrong usage or an
unusable checkpoint; 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP, without partial files.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from tinysr_kernels._version import __version__
from tinysr_kernels.cli import convert, doctor, env, info, upscale
from tinysr_kernels.cli.terminal import Parser, fill_standard_streams, say
from tinysr_kernels.errors import TinySRError

SUBCOMMANDS = (upscale, info, convert, doctor, env)


EXAMPLES = """examples:
  tinysr upscale photo.jpg                                writes photo_x4.jpg beside it
  tinysr upscale holidays/ -o large/ --model checkpoint/  a folder, with a model of your own
  tinysr upscale clip.mp4 -o clip_4k.mp4 --longest 3840   a film
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="tinysr",
        description="One-step diffusion super-resolution of images and videos.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tinysr {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(commands)
    return parser


def _terminate(signum: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


@contextmanager
def _orderly_termination() -> Iterator[None]:
    """Inside the block, SIGTERM and SIGHUP end the program like Ctrl-C: files in progress are discarded first."""
    previous: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # `nohup` has SIGHUP ignored, and it stays so. Only the main thread may set handlers.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            with suppress(ValueError):
                previous[number] = signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with the arguments (default: those of the process) and return its exit code."""
    fill_standard_streams()
    given = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not given:
        parser.print_help()
        return 0
    arguments = parser.parse_args(given)
    arguments.argv = given
    with _orderly_termination():
        try:
            return arguments.command(arguments)
        except TinySRError as error:
            say(f"tinysr: error: {error}")
            return 2
        except OSError as error:  # of the files of inputs and results each is reported for itself
            say(f"tinysr: error: {error}")
            return 1
        except KeyboardInterrupt:
            say("tinysr: interrupted; finished results are complete, resume with --skip-existing")
            return 130
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else 1


if __name__ == "__main__":
    sys.exit(main())
