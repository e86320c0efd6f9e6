"""The model families and what their checkpoints cannot say through tensor shapes.

Widths, depths, heads' count and group counts are read from the weights; a configuration holds only
what the weights leave open. Both `checkpoint/` (which fills them in) and `nets/` (which builds from
them) import this leaf module, so that neither has to know the other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Family = Literal["tinysr-dit", "adcsr", "tinysr-unet"]
ColorFix = Literal["adain", "wavelet", "none"]
FAMILIES: tuple[Family, ...] = ("tinysr-dit", "adcsr", "tinysr-unet")
COLOR_FIXES: tuple[ColorFix, ...] = ("adain", "wavelet", "none")

UPSCALE = 4
"""What every network that takes the low-resolution image itself enlarges by."""
GROUP_CANDIDATES = (32, 24, 16, 12, 8, 6, 4, 2, 1)


@dataclass(frozen=True)
class TinySRConfig:
    """TinySR: a pruned SD3 transformer between the halves of a tiny VAE (arXiv 2508.17434)."""

    head_dim: int = 64
    patch_size: int = 2
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    scaling_factor: float = 1.0
    overlap: int = 8
    """Latent pixels that neighbouring windows of the transformer share per axis."""

    @property
    def color_fix(self) -> ColorFix:
        return "adain"


@dataclass(frozen=True)
class UNetConfig:
    """A pruned UNet with a pruned KL or tiny decoder. The defaults are AdcSR's (arXiv 2411.13383)."""

    input: Literal["unshuffle", "vae"] = "unshuffle"
    unshuffle: int = 2
    head_dim: int = 48
    groups: tuple[int, ...] = GROUP_CANDIDATES
    """GroupNorm takes the first of these that divides its channel count."""
    unet_eps: float = 1e-5
    transformer_norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    decoder_eps: float = 1e-6
    prediction: Literal["direct", "subtract"] = "direct"
    """What the decoder receives with VAE input: the UNet's output, or the latent minus it."""
    residual: Literal["none", "bicubic"] = "none"
    """Whether the bicubic enlargement of the input is added to the decoder's output."""
    color_fix: ColorFix = "adain"
    scaling_factor: float = 1.0
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)


Config = TinySRConfig | UNetConfig


def config_class(family: Family) -> type[TinySRConfig] | type[UNetConfig]:
    """The configuration type of a family."""
    return TinySRConfig if family == "tinysr-dit" else UNetConfig


def config_to_dict(config: Config) -> dict[str, Any]:
    """A JSON-serialisable dictionary from which `config_from_dict` rebuilds the configuration."""
    return asdict(config)


def config_from_dict(family: Family, values: dict[str, Any]) -> Config:
    """Rebuild a configuration from JSON values.

    Raises ValueError naming the field when one is unknown, has the wrong type or a value outside its choices.
    """
    cls = config_class(family)
    default = cls()
    known = {f.name for f in fields(cls)}
    clean: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown configuration field {name!r}; known: {sorted(known)}")
        clean[name] = _coerce(name, value, getattr(default, name))
    return cls(**clean)


_CHOICES: dict[str, tuple[str, ...]] = {
    "input": ("unshuffle", "vae"),
    "prediction": ("direct", "subtract"),
    "residual": ("none", "bicubic"),
    "color_fix": COLOR_FIXES,
}


def _coerce(name: str, value: Any, default: Any) -> Any:
    """Check one JSON value against the type of the field's default; lists become tuples."""
    if name in _CHOICES and value not in _CHOICES[name]:
        raise ValueError(f"{name} must be one of {_CHOICES[name]}, found {value!r}")
    if isinstance(default, tuple):
        if not isinstance(value, (list, tuple)) or not value or not all(_positive_int(v) for v in value):
            raise ValueError(f"{name} must be a list of positive integers, found {value!r}")
        return tuple(value)
    if isinstance(default, int):
        if not _positive_int(value):
            raise ValueError(f"{name} must be a positive integer, found {value!r}")
        return value
    if isinstance(default, float):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive finite number, found {value!r}")
        return float(value)
    return value


def _positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31
