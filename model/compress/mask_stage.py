"""Mask learning as a training stage: mask probabilities and LoRA are trained together; resumable.

The transformer is the teacher's image stream with all blocks. Blocks that a sampled mask skips are bypassed, with one
relaxed mask per sample of the batch (see docs/compression/masks.md). The loss is the task loss plus the L1 distance
from the teacher's prediction (equation 11 of arXiv 2508.17434). The LoRA is used for the choice of blocks only:
restoration starts from the teacher's weights again, so that students with other masks can be compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.compress.masks import Mask, MaskLearner, Schedule, bypass, mask_loss
from model.compress.masks.decide import keep_per_group
from model.compress.training.device import Device
from model.compress.training.settings import StageSettings
from model.compress.training.stage import Losses, Stage, Turn, checkpointed
from model.reference.tinysr_dit import TinySRTransformer


@dataclass
class MaskBatch:
    """A batch for mask learning: latents and the teacher's predictions for them, both [N,C,S,S]."""

    z: Tensor
    teacher: Tensor
    task: Callable[[Tensor], Tensor]
    """The task loss of the student's x0."""


@dataclass(frozen=True)
class MaskSettings:
    """How masks are learned; `stage` trains the LoRA, the logits learn at their own rate."""

    stage: StageSettings
    keep: int
    group: int = 4
    reach: int = 1
    """Blocks that a neighboring pair of groups transfers at most; 1 is the paper's."""
    logit_learning_rate: float = Schedule.learning_rate
    transfer_share: float = Schedule.transfer_share
    """Of that rate, for the transfers' logits."""
    start_temperature: float = Schedule.start
    end_temperature: float = Schedule.end
    """Temperatures of the Gumbel noise, first and last."""


def masked(network: TinySRTransformer, z: Tensor, activity: Tensor, temb: Tensor) -> Tensor:
    """The network's prediction where block i counts with activity[...,i]."""
    blocks = [lambda x, block=block: block(x, temb) for block in network.transformer_blocks]
    return network.finish(bypass(blocks, network.pos_embed(z), activity), temb)


def learn_mask(
    network: TinySRTransformer,
    temb: Tensor,
    batch: Callable[[int, int], MaskBatch],
    settings: MaskSettings,
    folder: Path,
    *,
    name: str = "masks",
    device: Device | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Mask:
    """Learn which blocks of an adapted network to keep; masks.history.jsonl in `folder` has p and q over the steps.

    Raises ValueError where the groups cannot give the count that is asked for.
    """
    layers, stage_settings = len(network.transformer_blocks), settings.stage
    keep = keep_per_group(layers, settings.keep, settings.group)
    learner = MaskLearner(layers, group=settings.group, keep=keep, reach=settings.reach)
    schedule = Schedule(stage_settings.steps, settings.start_temperature, settings.end_temperature)
    scale = settings.logit_learning_rate / stage_settings.learning_rate
    scales = {"groups": scale, "transfers": scale * settings.transfer_share}
    about = {
        "keep": settings.keep,
        "group": settings.group,
        "reach": settings.reach,
        "temperatures": [settings.start_temperature, settings.end_temperature],
    }
    trained = {
        "groups": nn.ParameterList([learner.groups]),
        "transfers": nn.ParameterList([learner.transfers]),
        "transformer": network,
    }
    stage = Stage(name, folder, stage_settings, trained, device=device, about=about, scales=scales)
    learner.to(stage.device.device)
    temb = temb.to(stage.device.device)
    history = folder / f"{name}.history.jsonl"
    generator = torch.Generator(stage.device.device)

    def objective(turn: Turn) -> Losses:
        step = turn.step
        if stage.device.main and turn.batch % stage.turns == 0 and step % stage_settings.log_every == 0:
            _record(history, step, learner)
        # Processes draw masks of their own.
        generator.manual_seed((stage_settings.seed * 1_000_003 + turn.batch) * 1009 + stage.device.number[0])
        activities = learner.sample(schedule.temperature(step), turn.count, hard=schedule.hard, generator=generator)
        shown = batch(turn.batch, turn.count)
        found = masked(network, shown.z, activities, temb).float()
        loss = mask_loss(shown.task(shown.z - found), found, shown.teacher.float())
        return Losses(loss, {"sure": learner.probabilities().amax(-1).mean()})

    with checkpointed(network.transformer_blocks, stage_settings.gradient_checkpointing):
        stage.run(objective, report=report)
    if stage.device.main:
        _record(history, stage_settings.steps, learner)
    return learner.decide()


def _record(path: Path, step: int, learner: MaskLearner) -> None:
    """Append a row, unless the run went on from before one that is there."""
    rows = read_history(path)
    if rows and rows[-1]["step"] >= step:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        row = {
            "step": step,
            "marginals": learner.marginals().tolist(),
            "transfers": learner.transfer_probabilities().tolist(),
        }
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows that `learn_mask` wrote; none if there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
