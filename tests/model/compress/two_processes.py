"""Run under torchrun by test_stage.py: a stage on two processes, each with half of the batch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from model.compress.training.device import Device
from model.compress.training.settings import StageSettings
from model.compress.training.stage import Losses, Stage, Turn


def main(folder: Path) -> None:
    """Train a linear layer; every process saves its weights as N.pt."""
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    device = Device("float32", "cpu")
    number, processes = device.number
    stage = Stage("two", folder, StageSettings(5, 0.1, 4, warmup_steps=1), {"network": network}, device=device)

    def objective(turn: Turn) -> Losses:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(turn.batch)).chunk(processes)[number]
        return Losses(network(x).square().mean(), {})

    stage.run(objective)
    torch.save([network.state_dict(), processes], folder / f"{number}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
