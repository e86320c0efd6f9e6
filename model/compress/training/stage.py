"""One training stage: optimizer, schedule, precision, moving average of the weights, logs, checkpoints.

Every stage is a function `objective(turn)` of the turn alone: batches are drawn from generators seeded with seed and
turn. So an interrupted run resumes from its checkpoint with the same result; a checkpoint of another configuration is
refused. A batch too large for a GPU is computed in several turns, whose gradients are accumulated. With the package
`accelerate` the same loop runs on all GPUs of `accelerate launch`, without it on one device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.compress.training.device import Device
from model.compress.training.settings import StageSettings, rate

PATIENCE = 20
"""Losses in a row that are not finite, before a stage gives up: with float16 a few are to be expected."""


@dataclass(frozen=True)
class Turn:
    """One pass forward and backward of this process.

    step: the step of optimization that it is part of. batch: its number among the passes of this process, which
    together with the process's rank decides what is drawn. count: the samples to draw.
    """

    step: int
    batch: int
    count: int


@dataclass
class Losses:
    """Result of an objective for one turn: the loss, metrics to log, and the discriminator's loss if there is one."""

    loss: Tensor
    metrics: dict[str, Tensor]
    discriminator: Callable[[], Tensor] | None = None


Objective = Callable[[Turn], Losses]


def _learning(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained; a LoRA's checkpoint does not repeat the network."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def checkpointed(blocks: nn.ModuleList, enabled: bool) -> Iterator[None]:
    """Gradient checkpointing of `blocks` within this context, if enabled."""
    plain = [block.forward for block in blocks]
    if enabled:
        for block, forward in zip(blocks, plain, strict=True):
            block.forward = lambda *a, _f=forward: checkpoint(_f, *a, use_reentrant=False)
    try:
        yield
    finally:
        if enabled:
            for block in blocks:
                del block.forward


class Stage:
    """Trains `trained` (and `discriminator`) by an objective; files `NAME.pt` and `NAME.jsonl` in `folder`.

    `about` describes what the objective depends on besides the settings (weights of losses, sizes): with the settings
    and the shapes of all parameters it is the configuration that a state file must have been written with. `scales`
    multiplies the learning rate of the modules that it names.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: StageSettings,
        trained: Mapping[str, nn.Module],
        *,
        discriminator: nn.Module | None = None,
        device: Device | None = None,
        about: Mapping[str, Any] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        self.name, self.folder, self.settings = name, folder, settings
        self.device = device or Device(settings.precision, "cpu")
        self.trained, self.discriminator = dict(trained), discriminator
        self.parameters = [p for module in self.trained.values() for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"stage {name}: nothing to train")
        groups = [
            {"params": [p for p in module.parameters() if p.requires_grad], "scale": (scales or {}).get(key, 1.0)}
            for key, module in self.trained.items()
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=0.0, betas=(0.9, settings.beta2), weight_decay=settings.weight_decay
        )
        self.discriminator_parameters = list(discriminator.parameters()) if discriminator is not None else []
        self.discriminator_optimizer = (
            torch.optim.AdamW(
                self.discriminator_parameters,
                lr=settings.discriminator_learning_rate,
                betas=(0.0, settings.beta2),
                weight_decay=settings.discriminator_weight_decay,
            )
            if self.discriminator_parameters
            else None
        )
        self.average = [p.detach().clone() for p in self.parameters] if settings.ema_decay else []
        self.step, self.seconds, self.failures = 0, 0.0, 0
        self.count, self.turns = self._divided(settings)
        shapes = {
            f"{m}.{k}": list(p.shape)
            for m, mod in self.trained.items()
            for k, p in mod.named_parameters()
            if p.requires_grad
        }
        configuration = {
            "stage": name,
            **asdict(settings),
            **dict(about or {}),
            "processes": self.device.number[1],
            "scales": dict(scales or {}),
            "shapes": shapes,
        }
        self.configuration = json.loads(json.dumps(configuration))

    # ------------------------------------------------------------------------------------------------ state
    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.pt"

    def save(self) -> None:
        """Write everything needed to resume, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "configuration": self.configuration,
            "step": self.step,
            "seconds": self.seconds,
            "trained": {name: _learning(module) for name, module in self.trained.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "discriminator": self.discriminator.state_dict() if self.discriminator is not None else {},
            "discriminator_optimizer": self.discriminator_optimizer.state_dict()
            if self.discriminator_optimizer is not None
            else {},
        }
        beside = self.path.with_name(self.path.name + ".part")
        torch.save(state, beside)
        os.replace(beside, self.path)

    def resume(self) -> bool:
        """Resume from the checkpoint, if there is one; ValueError if it belongs to another configuration."""
        if not self.path.exists():
            return False
        try:
            state = torch.load(self.path, weights_only=True, map_location=self.device.device)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path}: damaged ({str(error)[:200]}); remove it to begin the stage anew") from error
        other, own = state["configuration"], self.configuration
        changed = sorted(k for k in {*other, *own} if other.get(k) != own.get(k))
        if changed:
            differences = ", ".join(
                f"{k}: {other.get(k)!r} there, {own.get(k)!r} here" for k in changed if k != "shapes"
            )
            differences = differences or "the networks' shapes differ"
            raise ValueError(
                f"{self.path} was written with another configuration ({differences}); remove it or restore that"
            )
        for name, module in self.trained.items():
            # Frozen parameters are not in the file; the configuration guarantees that nothing else is missing.
            module.load_state_dict(state["trained"][name], strict=False)
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.discriminator is not None and self.discriminator_optimizer is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.discriminator_optimizer.load_state_dict(state["discriminator_optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        return True

    # --------------------------------------------------------------------------------------------- training
    def _divided(self, settings: StageSettings) -> tuple[int, int]:
        """(samples of a turn, turns of a step) of each process; ValueError if the batch cannot be divided so."""
        processes = self.device.number[1]
        share = settings.batch_size // processes
        count = min(settings.micro_batch or share, share)
        turns = share // max(count, 1)
        if processes * turns * count != settings.batch_size:
            raise ValueError(
                f"stage {self.name}: batch_size {settings.batch_size} is no multiple of "
                f"{processes} processes x micro_batch {count}"
            )
        return count, turns

    def train_step(self, objective: Objective) -> dict[str, float]:
        """One step of optimization; returns what to log. ValueError after many losses that are not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.step, self.settings) * group["scale"]
        metrics: dict[str, float] = {}
        for turn in range(self.turns):
            for name, found in self._pass(
                objective, Turn(self.step, self.step * self.turns + turn, self.count)
            ).items():
                metrics[name] = metrics.get(name, 0.0) + found / self.turns
        clip = self.settings.max_grad_norm
        self.device.optimizer_step(self.optimizer, self.parameters, clip)
        if self.discriminator_optimizer is not None and "discriminator" in metrics:
            self.device.optimizer_step(self.discriminator_optimizer, self.discriminator_parameters, clip)
        self.device.end_step()
        self._check(metrics["loss"])
        self.step += 1
        if self.average:
            # Early on, the average must forget the start quickly.
            keep = min(self.settings.ema_decay, self.step / (self.step + 10))
            with torch.no_grad():
                for mean, value in zip(self.average, self.parameters, strict=True):
                    mean.lerp_(value, 1 - keep)
        return metrics

    def _pass(self, objective: Objective, turn: Turn) -> dict[str, float]:
        """Forward and backward of one turn; its share of the gradients is added to what is there."""
        with self.device.autocast():
            losses = objective(turn)
        self.device.backward(losses.loss / self.turns)
        metrics = {"loss": losses.loss, **losses.metrics}
        if losses.discriminator is not None and self.discriminator_optimizer is not None:
            with self.device.autocast():
                metrics["discriminator"] = losses.discriminator()
            self.device.backward(metrics["discriminator"] / self.turns)
        return {name: float(value.detach()) for name, value in metrics.items()}

    def _check(self, loss: float) -> None:
        """Give up where the losses stay without a finite value."""
        self.failures = 0 if math.isfinite(loss) else self.failures + 1
        if self.failures >= PATIENCE:
            raise ValueError(
                f"stage {self.name}: the loss was not finite in {PATIENCE} steps in a row, up to step {self.step}; "
                f"lower the learning rate, or train in float32 or bfloat16. The last state is {self.path}"
            )

    def run(
        self,
        objective: Objective,
        *,
        observe: Callable[[int], dict[str, float]] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Train to the end, or finish an interrupted run; `trained` then holds the resulting weights.

        `observe(step)` is called whenever a state is written, on the averaged weights: its metrics are logged, and
        it may write sample images.
        """
        if self.resume() and self.step < self.settings.steps:
            report(f"{self.name}: resuming at step {self.step}")
        self._trim_log()
        sums: dict[str, float] = {}
        count, before = 0, time.process_time()
        while self.step < self.settings.steps:
            metrics = self.train_step(objective)
            sums = {k: sums.get(k, 0.0) + v for k, v in metrics.items()}
            count += 1
            last = self.step == self.settings.steps
            if last or self.step % self.settings.log_every == 0:
                means, sums, count = {k: v / count for k, v in sums.items()}, {}, 0
                now = time.process_time()
                self.seconds, before = self.seconds + now - before, now
                self._log(means, report)
            if last or self.step % self.settings.save_every == 0:
                self._pause(observe, report)
        self._load_average()

    def _pause(self, observe: Callable[[int], dict[str, float]] | None, report: Callable[[str], None]) -> None:
        """Write the state; let `observe` look at the averaged weights."""
        if not self.device.main:
            return
        self.save()
        if observe is None:
            return
        kept = [p.detach().clone() for p in self.parameters]
        self._load_average()
        with torch.no_grad():
            self._log(observe(self.step), report)
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.copy_(value)

    def _load_average(self) -> None:
        """Put the averaged weights into the modules."""
        with torch.no_grad():
            for parameter, mean in zip(self.parameters, self.average, strict=bool(self.average)):
                parameter.copy_(mean)

    def _trim_log(self) -> None:
        """Remove the rows of steps that are trained again, and a row that was written in part."""
        path = self.folder / f"{self.name}.jsonl"
        if not self.device.main or not path.exists():
            return
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [row for row in rows if row.endswith("\n") and json.loads(row)["step"] <= self.step]
        if kept != rows:
            beside = path.with_name(path.name + ".part")
            beside.write_text("".join(kept), encoding="utf-8")
            os.replace(beside, path)

    def _log(self, metrics: dict[str, float], report: Callable[[str], None]) -> None:
        if not self.device.main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        entry = {"stage": self.name, "step": self.step, "seconds": round(self.seconds, 1), **metrics}
        with (self.folder / f"{self.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        shown = "  ".join(f"{k} {v:.5f}" for k, v in metrics.items())
        report(f"{self.name} {self.step}/{self.settings.steps}  {shown}  {self.seconds:.0f} s")
