"""`tinysr convert`: fold a checkpoint into one safetensors file."""

from __future__ import annotations

import argparse
from typing import Any

from tinysr_kernels.cli.terminal import DTYPES, number, put


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser("convert", help="fold a checkpoint into one safetensors file")
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("out", metavar="OUT", help="the file to write, ending in .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the stored weights (default: float32)")
    parser.add_argument("--quantize", choices=("fp8",), help="store TinySR's transformer in FP8 (E4M3)")
    conditioning = parser.add_argument_group("what is folded in", "for OSEDiff and its relatives")
    conditioning.add_argument("--prompt", metavar="TEXT", help="embedded by the checkpoint's text encoder")
    conditioning.add_argument("--embeddings", metavar="FILE", help="an embedding in place of the checkpoint's")
    conditioning.add_argument(
        "--lora-weights",
        type=number,
        nargs=2,
        metavar=("PIXEL", "SEMANTIC"),
        help="of PiSA-SR's LoRA (default: 1 1)",
    )
    conditioning.add_argument("--lora-alpha", type=number, metavar="X", help="of a LoRA whose files do not state it")
    parser.add_argument(
        "--force", action="store_true", help="replace OUT if it is a folded file; no other file ever is"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the folded file and print its path.

    Raises InputError, before the checkpoint is read, where OUT cannot be written or must not be replaced;
    CheckpointError if writing fails.
    """
    import tinysr_kernels
    from tinysr_kernels.runtime.arguments import check_save

    check_save(arguments.out, replace=arguments.force)
    model = tinysr_kernels.compile(
        arguments.checkpoint,
        device="cpu",
        dtype=arguments.dtype,
        quantize=arguments.quantize,
        embeddings=arguments.embeddings,
        prompt=arguments.prompt,
        lora_weights=arguments.lora_weights,
        lora_alpha=arguments.lora_alpha,
    )
    model.save(arguments.out, replace=arguments.force)
    put(arguments.out)
    return 0
