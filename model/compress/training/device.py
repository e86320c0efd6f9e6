"""Where a stage runs: one device, or all of `accelerate launch`; precision, gradients and steps of optimization."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor, nn

from model.compress.training.settings import PRECISIONS


class Device:
    """Where a stage runs: one device, or one of several processes of `accelerate launch` or `torchrun`."""

    def __init__(self, precision: str = "float32", device: str | None = None) -> None:
        self.precision = precision
        self.accelerator: Any = None
        if "WORLD_SIZE" in os.environ:
            if not importlib.util.find_spec("accelerate"):
                raise ValueError("several processes need the package accelerate: pip install accelerate")
            self.accelerator = importlib.import_module("accelerate").Accelerator(cpu=device == "cpu")
            self.device = torch.device(self.accelerator.device)
        else:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")

    @property
    def main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.number[0] == 0

    @property
    def number(self) -> tuple[int, int]:
        """(rank of this process, number of processes); objectives use the rank in their seeds."""
        if self.accelerator is None:
            return 0, 1
        return int(self.accelerator.process_index), int(self.accelerator.num_processes)

    def wait(self) -> None:
        """Wait until all processes arrive here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The context the forward pass runs in."""
        return torch.autocast(self.device.type, PRECISIONS[self.precision], enabled=self.precision != "float32")

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self._scaler.scale(loss).backward()

    def optimizer_step(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float) -> None:
        """Average the gradients over the processes and clip them; then a step, unless a gradient is not finite."""
        if self.accelerator is not None:
            # Before the scale is taken away: what one process finds not to be finite, all must find.
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        self._scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if self._scaler.is_enabled():
            self._scaler.step(optimizer)
        elif bool(torch.isfinite(norm)):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def end_step(self) -> None:
        """After the last optimizer of a step: adapt the scale of the losses."""
        if self._scaler.is_enabled():
            self._scaler.update()
