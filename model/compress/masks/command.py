"""The command `masks-proof`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from model.compress.masks import proof, proof_results

SUMMARY = "prove mask learning on objectives whose every mask is tried; minutes on a CPU"


def add_to(commands: Any) -> None:
    """Add the command to the subparsers `commands`."""
    parser: argparse.ArgumentParser = commands.add_parser("masks-proof", help=SUMMARY, description=SUMMARY)
    parser.add_argument("--out", type=Path, default=Path("docs/compression"), help="folder for JSON and figures")
    parser.add_argument("--seeds", type=int, default=len(proof.SEEDS), help="objectives of each family")
    parser.add_argument("--steps", type=int, default=proof.SCHEDULE.steps, help="of every learner")
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if the learner meets its bar in every family, else 1."""
    if args.seeds < 1 or args.steps < 1:
        raise ValueError(f"at least one seed and one step, not {args.seeds} and {args.steps}")
    torch.set_num_threads(args.threads)
    schedule = replace(proof.SCHEDULE, steps=args.steps)
    return 0 if proof_results.run(args.out, range(args.seeds), say, schedule) else 1


def say(line: str) -> None:
    """Progress goes to standard output at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
