"""The recipe for a real teacher, from a configuration file: one dataclass, the paper's settings as defaults.

The numbers of steps, the rank, the learning rate of mask learning and the weights of the losses are the paper's (arXiv
2508.17434, section 4 and supplement); batch sizes are per process, and with those of the critics and the learning rates
of the other stages they are this project's choice.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from model.compress.mask_stage import MaskSettings
from model.compress.restoration import PictureWeights
from model.compress.training.stage import StageSettings
from model.compress.vae.train import DecoderWeights

T = TypeVar("T")


def _stage(steps: int, rate: float, batch: int, **more: Any) -> Any:
    settings = StageSettings(steps, rate, batch, precision="bfloat16", save_every=2000, log_every=100, **more)
    return field(default_factory=lambda: settings)


@dataclass(frozen=True)
class Recipe:
    """Where things lie, and how every stage is trained."""

    teacher: str
    """Folder with transformer/ and vae/ in diffusers' layout."""
    pictures: str
    """Folder of large pictures; sub-folders are searched."""
    out: str
    lora: str | None = None
    prompt: str = "prompt_embeds.pt"
    """The teacher's prompt embedding [1,T,J]."""
    pooled: str = "pool_embeds.pt"
    """The pooled one [1,P]."""
    side: int = 512
    """Of the pictures trained on; eight times the transformer's window."""
    width: int = 64
    """Channels of the compressed VAE."""
    rank: int = 64
    pairs: int = 50_000
    """Latents encoded beforehand for the first stage of restoration."""
    seed: int = 0
    device: str | None = None
    encoder: StageSettings = _stage(100_000, 1e-4, 8, ema=0.999)
    decoder: StageSettings = _stage(200_000, 1e-4, 4, ema=0.999)
    decoder_weights: DecoderWeights = field(default_factory=DecoderWeights)
    masks: MaskSettings = field(
        default_factory=lambda: MaskSettings(
            StageSettings(
                100_000,
                5e-5,
                2,
                constant=True,
                precision="bfloat16",
                checkpointing=True,
                save_every=2000,
                log_every=100,
            ),
            keep=12,
            logit_rate=0.01,
        )
    )
    restore_latents: StageSettings = _stage(150_000, 1e-4, 8, ema=0.999, checkpointing=True)
    restore_pictures: StageSettings = _stage(50_000, 5e-5, 2, ema=0.999, checkpointing=True)
    picture_weights: PictureWeights = field(default_factory=PictureWeights)

    def __post_init__(self) -> None:
        if self.side % 64:
            raise ValueError(f"side must be a multiple of 64, found {self.side}")


def load(path: Path) -> Recipe:
    """A recipe from JSON, or from TOML on Python 3.11 and later; ValueError names a field that does not fit."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".toml":
        try:
            import tomllib
        except ImportError as error:
            raise ValueError(f"{path}: TOML needs Python 3.11; write the same as JSON") from error
        values = tomllib.loads(text)
    else:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: no JSON: {error}") from error
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
