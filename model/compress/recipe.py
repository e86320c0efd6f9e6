"""The recipe for a real teacher, from a configuration file: one dataclass, the paper's settings as defaults.

Steps, learning rates, batch sizes, weights of losses, AdamW's settings, float16, LoRA's rank and the seed are the
paper's (arXiv 2508.17434, section 4 and supplement A), for eight GPUs. How a batch is cut (`micro_batch`), the moving
average of the weights and the warm-up of stages other than mask learning are this project's choice, and so is the
discriminator: a PatchGAN with spectral normalization in place of the paper's projected one on DINO's features.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from model.compress.mask_stage import MaskSettings
from model.compress.restoration import ImageLossWeights
from model.compress.training.second_order import SecondOrder
from model.compress.training.settings import StageSettings
from model.compress.vae.train import DecoderWeights

T = TypeVar("T")


SEED = 80


def _settings(steps: int, rate: float, batch: int, micro: int, **more: Any) -> StageSettings:
    return StageSettings(
        steps, rate, batch, micro, weight_decay=1e-4, beta2=0.999, discriminator_weight_decay=1e-4,
        precision="float16", save_every=2000, log_every=100, seed=SEED, **more,
    )  # fmt: skip


def _stage(steps: int, rate: float, batch: int, micro: int, **more: Any) -> Any:
    settings = _settings(steps, rate, batch, micro, **more)
    return field(default_factory=lambda: settings)


@dataclass(frozen=True)
class Recipe:
    """Where things lie, and how every stage is trained."""

    teacher: str
    """Folder with transformer/ and vae/ in diffusers' layout."""
    images: str
    """Folder of large images; subfolders are searched."""
    out: str
    low_resolution: str | None = None
    """Folder of low-resolution images with the originals' names; None: originals are degraded."""
    degradation: SecondOrder = field(default_factory=SecondOrder)
    lora: str | None = None
    prompt: str = "prompt_embeds.pt"
    """The teacher's prompt embedding [1,T,J]."""
    pooled: str = "pool_embeds.pt"
    """The pooled one [1,P]."""
    image_size: int = 512
    """Of the images trained on; eight times the transformer's window."""
    vae_width: int = 64
    """Channels of the compressed VAE."""
    lora_rank: int = 64
    latent_pairs: int = 50_000
    """Latents encoded beforehand for the first stage of restoration."""
    seed: int = SEED
    device: str | None = None
    encoder: StageSettings = _stage(100_000, 3e-4, 64, 8, ema_decay=0.999)
    decoder: StageSettings = _stage(200_000, 5e-4, 64, 4, ema_decay=0.999, discriminator_learning_rate=1e-5)
    decoder_weights: DecoderWeights = field(default_factory=DecoderWeights)
    masks: MaskSettings = field(
        default_factory=lambda: MaskSettings(
            _settings(100_000, 5e-5, 8, 1, warmup_steps=3000, gradient_checkpointing=True),
            keep=12,
            logit_learning_rate=0.01,
        )
    )
    restore_latents: StageSettings = _stage(150_000, 1e-4, 128, 8, ema_decay=0.999, gradient_checkpointing=True)
    restore_images: StageSettings = _stage(
        50_000, 1e-6, 96, 2, ema_decay=0.999, gradient_checkpointing=True, discriminator_learning_rate=5e-6
    )
    image_weights: ImageLossWeights = field(default_factory=ImageLossWeights)

    def __post_init__(self) -> None:
        if self.image_size % 64 or self.image_size < 64:
            raise ValueError(f"image_size must be a multiple of 64, found {self.image_size}")
        for name in ("vae_width", "lora_rank", "latent_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, found {self.seed}")


def load(path: Path) -> Recipe:
    """A recipe from JSON or TOML; ValueError names a field that does not fit."""
    text = path.read_text(encoding="utf-8")
    kind, parse = ("TOML", tomllib.loads) if path.suffix == ".toml" else ("JSON", json.loads)
    try:
        values = parse(text)
    except ValueError as error:
        raise ValueError(f"{path}: no {kind}: {error}") from error
    return build(Recipe, values, str(path))


def build(kind: type[T], values: Any, where: str, default: T | None = None) -> T:
    """A dataclass from a dictionary; what is not named keeps its value in `default`, or the class's own default."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a table, found {values!r}")
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}; known: {', '.join(sorted(known))}")
        before = getattr(default, name) if default is not None else _default(known[name])
        if is_dataclass(hints[name]) and isinstance(hints[name], type):
            clean[name] = build(hints[name], value, f"{where}: {name}", before)
        elif isinstance(before, tuple) and isinstance(value, list):
            if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value):
                raise ValueError(f"{where}: {name}: expected numbers, found {value!r}")
            clean[name] = tuple(value)
        elif before is not None and not isinstance(
            value, (type(before), int) if type(before) is float else type(before)
        ):
            raise ValueError(f"{where}: {name}: expected {type(before).__name__}, found {value!r}")
        else:
            clean[name] = value
    try:
        return dataclasses.replace(default, **clean) if default is not None else kind(**clean)  # type: ignore[type-var]
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _default(known: Any) -> Any:
    if known.default_factory is not dataclasses.MISSING:
        return known.default_factory()
    return None if known.default is dataclasses.MISSING else known.default


def as_json(recipe: Recipe) -> str:
    """The recipe as a configuration file."""
    return json.dumps(dataclasses.asdict(recipe), indent=2) + "\n"
