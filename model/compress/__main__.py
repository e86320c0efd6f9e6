"""The recipe's commands, `python -m model.compress COMMAND --help`; docs/compression.md is the guide."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from model.compress import count, real, recipe
from model.compress.conditions import parse_mask
from model.compress.init import WIDTH, WINDOW, init
from model.compress.masks import command as proof
from model.compress.small.preset import SMALL, trial
from model.compress.small.run import small
from model.compress.teacher_files import part, transformer_config


def say(line: str) -> None:
    """Print progress, unbuffered, so that a log can be followed."""
    print(line, flush=True)


def run_init(args: argparse.Namespace) -> None:
    """Build the student from a teacher on disk."""
    folder, values = part(args.teacher, "transformer", "SD3Transformer2DModel")
    layers = transformer_config(values, str(folder / "config.json")).num_layers
    mask = parse_mask(args.mask, layers, args.keep if args.keep is not None else layers // 2)
    init(
        args.teacher,
        mask,
        args.out,
        lora=args.lora,
        pooled=args.pooled,
        width=args.width,
        window=args.window,
        separable_decoder=args.separable_decoder,
        report=say,
    )


def run_count(args: argparse.Namespace) -> None:
    """Print the table of parameters and multiplications at the real shapes."""
    teacher, student = count.real_tables(args.blocks, args.tokens, args.separable_decoder)
    say(count.markdown(teacher, student))


def run_small(args: argparse.Namespace) -> None:
    """Train and compress the small teacher."""
    torch.set_num_threads(args.threads)
    small(trial() if args.trial else SMALL, args.out, say)
    say(str(args.out / "RESULTS.md"))


def run_stage(args: argparse.Namespace) -> None:
    """One stage of the recipe on a real teacher."""
    {"masks": real.run_masks, "vae": real.run_vae, "restore": real.run_restore}[args.stage](
        recipe.load(args.config), say
    )


def run_config(args: argparse.Namespace) -> None:
    """Print a configuration file with the paper's settings."""
    say(recipe.as_json(recipe.Recipe(teacher="TEACHER", images="IMAGES", out="OUT", lora="LORA")))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="python -m model.compress", description=(__doc__ or "").splitlines()[0])
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("init", help="the untrained student of a TSD-SR checkpoint")
    command.add_argument("--teacher", type=Path, required=True, help="folder with transformer/ and vae/ (diffusers)")
    command.add_argument("--lora", type=Path, help="folder with transformer.safetensors and vae.safetensors")
    command.add_argument("--mask", required=True, help="a 0 or 1 per block, 1 for those that stay")
    command.add_argument("--keep", type=int, help="how many blocks the mask must keep (default: half)")
    command.add_argument("--pooled", type=Path, help="pooled prompt embedding; with it the modulation is pre-cached")
    command.add_argument("--width", type=int, default=WIDTH, help="channels of the VAE (default %(default)s)")
    command.add_argument("--window", type=int, default=WINDOW, help="side of the latents (default %(default)s)")
    command.add_argument("--separable-decoder", action="store_true", help="separate the decoder's convolutions too")
    command.add_argument("--out", type=Path, required=True, help="folder to write, in TinySR's released layout")
    command.set_defaults(run=run_init)

    command = commands.add_parser("config", help="print a configuration file with the paper's settings")
    command.set_defaults(run=run_config)
    for stage, text in (
        ("masks", "learn which blocks stay"),
        ("vae", "compress the VAE and train its halves"),
        ("restore", "restore the pruned network, write it"),
    ):
        command = commands.add_parser(stage, help=f"{text}; resumes an interrupted run")
        command.add_argument("--config", type=Path, required=True, help="JSON, or TOML on Python 3.11")
        command.set_defaults(run=run_stage, stage=stage)

    command = commands.add_parser("count", help="parameters and multiplications at the real shapes; no weights needed")
    command.add_argument("--blocks", type=int, default=12, help="blocks of the student (default %(default)s)")
    command.add_argument("--tokens", type=int, default=count.PROMPT_TOKENS, help="prompt tokens (default %(default)s)")
    command.add_argument("--separable-decoder", action="store_true", help="count a separable decoder")
    command.set_defaults(run=run_count)

    command = commands.add_parser("small", help="train a small teacher and compress it, on a CPU")
    command.add_argument("--out", type=Path, default=Path("build/small"), help="folder; a run in it is resumed")
    command.add_argument("--threads", type=int, default=1)
    command.add_argument("--trial", action="store_true", help="a few steps of everything, in seconds")
    command.set_defaults(run=run_small)
    proof.add_to(commands)
    return root


def main(arguments: list[str] | None = None) -> int:
    """Run a command; exit code 2 for input that does not fit, with the reason on standard error."""
    args = parser().parse_args(arguments)
    try:
        code = args.run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code or 0


if __name__ == "__main__":
    sys.exit(main())
