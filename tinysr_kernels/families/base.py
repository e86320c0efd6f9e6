"""The interface of a model family: everything that is peculiar to one network, in one class in one file.

A family says how its checkpoints are recognized (`parts`), turns what was found into checked tensors under normalized
names (`read`), folds constants into them (`fold`) and builds the fused network (`build`). The rest of the package asks
these and never a family's name. docs/add-a-family.md goes through an example.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tinysr_kernels import nets
from tinysr_kernels.checkpoint.detect import Folder, Part
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.sources import FoundPart
from tinysr_kernels.nets import Network

ColorFix = Literal["adain", "wavelet", "none"]
COLOR_FIXES: tuple[ColorFix, ...] = ("adain", "wavelet", "none")


class Config(Protocol):
    """A family's configuration: a frozen dataclass of what shapes leave open, with a default for every field.

    `families/config.py` says which types its fields may have.
    """

    @property
    def color_fix(self) -> ColorFix:
        """What `compile` uses unless the caller says otherwise; a field, or a property where it never varies."""


C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class Adain:
    """How a family matches colors with `adain`: (SR - mean) * gain + mean_LR per channel.

    eps: added to the variances of images in [0,1]. least: a standard deviation of SR below it counts as this much, so
    that noise of a flat image is not amplified. clamp: SR to [0,1] before it is measured. enlarged: LR is measured
    enlarged as Pillow does it, not at its own size.
    """

    eps: float = 0.0
    least: float = 1 / 255
    clamp: bool = False
    enlarged: bool = False


@dataclass
class Found:
    """The parts of one checkpoint, wherever they were: a folder, a file, a dict or a module.

    source: names the checkpoint in messages. parts: by role, one for each of the family's `parts`. lora: see
    `Family.takes_lora`. named: files of embeddings that the caller passed; beside: those found with the checkpoint.
    per_image: whether each image is to have embeddings of its own, so that none is a constant, see `Family.per_image`.
    notices: what was ignored or chosen so far, one sentence each; `read` adds its own. prompt: the caller's, see
    `Family.takes_prompt`. lora_alpha, lora_weights: the caller's, see `Family.takes_lora_alpha` and `adapters`.
    configs, models: the JSON files of a folder, see `checkpoint.detect.Folder`.
    """

    source: str
    parts: dict[str, FoundPart]
    lora: TensorFile | None = None
    named: list[TensorFile] = field(default_factory=list)
    beside: list[TensorFile] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    per_image: bool = False
    prompt: str | None = None
    lora_alpha: float | None = None
    lora_weights: tuple[float, ...] | None = None
    configs: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)
    models: list[tuple[Path, dict[str, Any]]] = field(default_factory=list)


@dataclass
class Checkpoint:
    """A checked checkpoint.

    `tensors` lie on the CPU in their stored dtype, except what was merged or evaluated while loading (float32 or
    wider). They may be memory-mapped from the file they came from, so treat them as read-only.
    """

    family: str
    """A key of `families.FAMILIES`."""
    config: Any
    """Of that family's `config_class`."""
    tensors: Mapping[str, Tensor]
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
    file: Path | None = None
    """The folded file it was read from, which `save` never replaces; None for every other kind."""
    metadata: dict[str, str] = field(default_factory=dict)
    """The metadata of a folded file, as stored; empty for every other kind."""


class Family(ABC, Generic[C]):
    """One family of networks. An instance stands in `families.FAMILIES`; it holds no state."""

    name: ClassVar[str]
    """Its name in metadata, reports and options, such as "tinysr-dit"."""
    summary: ClassVar[str]
    """What a checkpoint of it is, with an article, for messages that list what `compile` takes."""
    parts: ClassVar[tuple[Part, ...]]
    """The parts of a checkpoint, the one that shows the family first. With one part a single file is a checkpoint."""
    config_class: type[C]
    """Its configuration."""

    dtype: ClassVar[str] = "float16"
    """The dtype that `compile` chooses on a GPU."""
    quantizations: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The values of `compile(quantize=...)` that `quantize` takes, each with the part of the network it changes."""
    adain: ClassVar[Adain] = Adain()
    """How the color fix "adain" works for it."""
    takes_lora: ClassVar[bool] = False
    """Whether a LoRA may lie beside the parts."""
    takes_embeddings: ClassVar[bool] = False
    """Whether `compile(embeddings=...)` and files of embeddings beside the parts mean anything to it."""
    per_image: ClassVar[bool] = False
    """Whether each image may have embeddings of its own: `compile(embeddings=...)` of something that is called."""
    takes_prompt: ClassVar[bool] = False
    """Whether `compile(prompt=...)` means anything to it."""
    takes_lora_alpha: ClassVar[bool] = False
    """Whether `compile(lora_alpha=...)` means anything to it: a LoRA's alpha, which its files may not state."""
    adapters: ClassVar[tuple[str, ...]] = ()
    """The LoRA adapters that `compile(lora_weights=...)` has a weight for each."""
    embedding_names: ClassVar[re.Pattern[str] | None] = None
    """Names that tensors have in its files of embeddings alone, where the general rule does not know them."""
    own_format: ClassVar[bool] = False
    """Whether its one file carries this project's metadata, whose configuration is then the part's `own`."""

    def select(self, folder: Folder, main: TensorFile) -> None:
        """Of several candidates for a part in a folder, keep in `folder.files` those that fit `main`. Default: all.

        A part with a `class_name` has been narrowed to files beside a configuration of that class already.
        """

    def split(self, whole: FoundPart, module: nn.Module, label: str) -> dict[str, FoundPart]:
        """What each part, by role, is in a module that holds all of them. Default: the whole state dict is every part.

        Raises CheckpointError, beginning with `label`, where the module lacks one.
        """
        return {part.role: whole for part in self.parts}

    @abstractmethod
    def read(self, found: Found) -> Checkpoint:
        """Check every tensor's name, shape and values, and rename it as `fold` expects; merge and evaluate what can be.

        Raises CheckpointError naming file, key, expected and found.
        """

    @abstractmethod
    def fold(self, config: C, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """Fold every constant in float64 and round once: matrices to `dtype`, vectors to float32 or wider.

        tensors: what `read` gave.
        """

    @abstractmethod
    def build(self, config: C, folded: Mapping[str, Tensor]) -> Network:
        """The network over folded tensors, each of which becomes a buffer. KeyError names one that is missing.

        A `LatentNetwork` runs between exact tiles in windows of one size, a `PixelNetwork` whole or in blended tiles.
        """

    def quantize(self, folded: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
        """Folded tensors, best in float64, in the form `kind` of `quantizations`; quantized ones stay as they are."""
        raise NotImplementedError(f"{self.name} lists no quantization")

    def folds(self, folded: Mapping[str, Tensor]) -> list[str]:
        """What was folded, one phrase each, for `info`. Default: what the building blocks' names show."""
        return nets.folds(folded)
