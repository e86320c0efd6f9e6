"""What loading a checkpoint yields."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tinysr_kernels.families import Config, Family


@dataclass
class Checkpoint:
    """A checked checkpoint.

    `tensors` lie on the CPU in their stored dtype, except what was merged or evaluated while loading (float32 or
    wider). They may be memory-mapped from the file they came from, so treat them as read-only.
    """

    family: Family
    config: Config
    tensors: dict[str, Tensor]
    folded: bool = False
    """Whether `tensors` are a saved compiled model's folded weights rather than a checkpoint's own."""
    folded_dtype: str | None = None
    """The dtype a folded file was written for, such as "float16"; None for every other kind."""
    notices: list[str] = field(default_factory=list)
    """What was ignored or chosen on the way, one sentence each."""
    merged: list[str] = field(default_factory=list)
    """What was merged into the weights while loading, one phrase each."""
    source: str = ""
    """Where the checkpoint came from, for messages."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The metadata of a folded file, as stored; empty for every other kind."""
