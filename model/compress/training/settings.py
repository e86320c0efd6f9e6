"""How a stage is trained: its settings, the ranges that they may have, and the learning rate over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


RANGES = (
    ("steps", 0, 10**9),
    ("learning_rate", 0, 1),
    ("discriminator_learning_rate", 0, 1),
    ("batch_size", 1, 10**6),
    ("micro_batch", 0, 10**6),
    ("warmup_steps", 0, 10**9),
    ("weight_decay", 0, 1),
    ("discriminator_weight_decay", 0, 1),
    ("beta2", 0, 1 - 1e-9),
    ("max_grad_norm", 1e-9, 1e9),
    ("ema_decay", 0, 1 - 1e-9),
    ("save_every", 1, 10**9),
    ("log_every", 1, 10**9),
    ("seed", 0, 2**32 - 1),
)
"""The values that settings may have."""


@dataclass(frozen=True)
class StageSettings:
    """How long and how a stage is trained, by AdamW."""

    steps: int
    learning_rate: float
    batch_size: int
    """Samples per step of optimization, of all processes together."""
    micro_batch: int = 0
    """Samples that a process computes at once at most; it accumulates the gradients of its share. 0: all of it."""
    warmup_steps: int = 100
    weight_decay: float = 0.0
    beta2: float = 0.99
    """Decay of the mean of squared gradients; that of gradients is 0.9, and 0 for the discriminator."""
    max_grad_norm: float = 1.0
    """Maximum norm of the gradient, for clipping."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is the result of the stage; 0: the last weights are."""
    constant_learning_rate: bool = False
    """Keep the learning rate constant after the warm-up, instead of cosine decay."""
    discriminator_learning_rate: float = 1e-4
    discriminator_weight_decay: float = 0.01
    precision: str = "float32"
    gradient_checkpointing: bool = False
    """Recompute the blocks' activations in the backward pass instead of storing them."""
    save_every: int = 500
    log_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {sorted(PRECISIONS)}, found {self.precision!r}")
        for name, least, most in RANGES:
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} must be from {least} to {most}, found {value}")


def rate(step: int, settings: StageSettings) -> float:
    """Learning rate: linear warm-up, then cosine decay to zero, or constant (`constant_learning_rate`)."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.constant_learning_rate:
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
