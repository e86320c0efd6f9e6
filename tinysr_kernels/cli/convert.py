"""`tinysr convert`: fold a checkpoint into one safetensors file."""

from __future__ import annotations

import argparse
import os
from typing import Any

from tinysr_kernels.cli.terminal import DTYPES
from tinysr_kernels.errors import CheckpointError, InputError


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser("convert", help="fold a checkpoint into one safetensors file")
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("out", metavar="OUT", help="the file to write")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the stored weights (default: float32)")
    parser.add_argument("--quantize", choices=("fp8",), help="store TinySR's transformer in FP8 (E4M3)")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the folded file and print its path.

    Raises InputError if it would overwrite the checkpoint, CheckpointError if it cannot be written.
    """
    if os.path.exists(arguments.out) and os.path.samefile(arguments.out, arguments.checkpoint):
        raise InputError(f"{arguments.out} is the checkpoint itself; choose another name")
    import tinysr_kernels

    model = tinysr_kernels.compile(
        arguments.checkpoint, device="cpu", dtype=arguments.dtype, quantize=arguments.quantize
    )
    try:
        model.save(arguments.out)
    except OSError as error:
        raise CheckpointError(f"{arguments.out} cannot be written: {error}") from error
    print(arguments.out)
    return 0
