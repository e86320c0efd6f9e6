"""From a joint transformer to TinySR's: some blocks, the image's stream alone, time and prompt as constants.

The teacher runs at t = 1000 with one prompt, so the modulation of every block is constant. It is evaluated once, in
float64, and replaces the modules that compute it, as buffers in TinySR's released layout. The prompt stream is removed;
mask learning and restoration compensate for what its tokens contributed to attention. Tensors are processed one at a
time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.compress.masks import check_mask
from model.compress.teacher_files import LoRA
from model.reference.sd3_transformer import SD3Config, crop_table
from model.reference.tinysr_dit import BLOCK_MODULATION, CONTEXT_LEFTOVER, OUT_MODULATION, timestep_embedding

BLOCK = "transformer_blocks"
EMBEDDERS = "time_text_embed"


def parse_mask(text: str, layers: int, keep: int | None = None) -> tuple[bool, ...]:
    """ "101..." as a mask; ValueError for other characters, another length than the teacher's, another count."""
    bits = text.replace(",", "").replace(" ", "")
    if set(bits) - {"0", "1"}:
        raise ValueError(f"a mask is written with 0 and 1, found {text!r}")
    return check_mask([bit == "1" for bit in bits], layers, keep)


def expected_shapes(config: SD3Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a teacher's tensors, built on the meta device."""
    from model.reference.sd3_transformer import SD3Transformer

    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in SD3Transformer(config).state_dict().items()}


def check_teacher(shapes: Mapping[str, tuple[int, ...]], config: SD3Config, where: str) -> None:
    """Weights and configuration must agree; ValueError names the first tensor that does not fit."""
    wanted = expected_shapes(config)
    for name, shape in wanted.items():
        if name not in shapes:
            raise ValueError(f"{where}: {name}: missing; this is no SD3 transformer of {config.num_layers} blocks")
        if tuple(shapes[name]) != shape:
            raise ValueError(
                f"{where}: {name}: expected {list(shape)}, as config.json says, found {list(shapes[name])}"
            )
    unexpected = sorted(set(shapes) - set(wanted))
    if unexpected:
        raise ValueError(f"{where}: {unexpected[0]}: not a tensor of an SD3 transformer")


def check_window(config: SD3Config, window: int) -> None:
    """The latents' side must hold whole patches, as many as there are positions; ValueError otherwise."""
    if window < 1 or window % config.patch_size:
        raise ValueError(f"a window of {window} latents holds no whole patches of {config.patch_size}")
    if window // config.patch_size > config.pos_embed_max_size:
        raise ValueError(
            f"a window of {window} latents needs more than the {config.pos_embed_max_size} positions a side"
        )


def check_pooled(pooled: Tensor, width: int) -> None:
    """The pooled prompt embedding must be [1,width]; ValueError otherwise."""
    if tuple(pooled.shape) != (1, width):
        raise ValueError(f"the pooled embedding must be [1, {width}], found {list(pooled.shape)}")


def embedding(teacher: Mapping[str, Tensor], pooled: Tensor, lora: LoRA) -> Tensor:
    """temb [1,D] float64, before any SiLU, from the pooled prompt embedding [1,P] at t = 1000."""

    def embed(name: str, x: Tensor) -> Tensor:
        for i in (1, 2):
            weight = lora.merged(f"{name}.linear_{i}.weight", teacher[f"{name}.linear_{i}.weight"])
            x = F.linear(F.silu(x) if i == 2 else x, weight.double(), teacher[f"{name}.linear_{i}.bias"].double())
        return x

    check_pooled(pooled, teacher[f"{EMBEDDERS}.text_embedder.linear_1.weight"].shape[1])
    time = embed(f"{EMBEDDERS}.timestep_embedder", timestep_embedding())
    return time + embed(f"{EMBEDDERS}.text_embedder", pooled.double())


def student_tensors(
    teacher: Mapping[str, Tensor],
    config: SD3Config,
    mask: Sequence[bool],
    *,
    window: int,
    pooled: Tensor | None = None,
    lora: LoRA | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of TinySR's transformer under their public names, in the teacher's dtype (modulation in float32).

    `window` is the side of the latents it will run on. Without `pooled` the modules of the modulation stay, and its
    buffers have zero elements, as in a checkpoint that was saved before its first forward. Raises ValueError for a
    mask that does not fit and a window without whole patches or positions.
    """
    lora = lora or LoRA({}, "no LoRA")
    mask = check_mask(mask, config.num_layers)
    if not any(mask):
        raise ValueError("the mask keeps no block")
    check_window(config, window)
    temb = None if pooled is None else embedding(teacher, pooled, lora)
    numbers = {old: new for new, old in enumerate(i for i, kept in enumerate(mask) if kept)}
    for name in teacher:
        renamed = _renamed(name, numbers)
        if renamed is None or (temb is not None and _conditions(name)):
            continue
        if name == "pos_embed.pos_embed":
            side = window // config.patch_size
            yield name, crop_table(teacher[name], side, side).clone()
        else:
            yield renamed, lora.merged(name, teacher[name])
    sources = [(f"{BLOCK}.{old}.norm1.linear", f"{BLOCK}.{new}.", BLOCK_MODULATION) for old, new in numbers.items()]
    for linear, prefix, parts in [*sources, ("norm_out.linear", "", OUT_MODULATION)]:
        if temb is None:
            yield from ((prefix + part, torch.zeros(0)) for part in parts)
            continue
        weight = lora.merged(f"{linear}.weight", teacher[f"{linear}.weight"])
        value = F.linear(F.silu(temb), weight.double(), teacher[f"{linear}.bias"].double())
        yield from ((prefix + part, v.float()) for part, v in zip(parts, value.chunk(len(parts), 1), strict=True))


def _renamed(name: str, numbers: Mapping[int, int]) -> str | None:
    """A tensor's name in the student; None for blocks that are cut and for the prompt's stream."""
    if CONTEXT_LEFTOVER.search(name):
        return None
    head, _, rest = name.partition(".")
    if head != BLOCK:
        return name
    number, _, tail = rest.partition(".")
    return f"{BLOCK}.{numbers[int(number)]}.{tail}" if int(number) in numbers else None


def _conditions(name: str) -> bool:
    """Whether the tensor belongs to what the modulation is made by."""
    return name.startswith((f"{EMBEDDERS}.", "norm_out.")) or ".norm1." in name


def student_config(config: SD3Config, mask: Sequence[bool]) -> dict[str, object]:
    """config.json of the student, as the release has it."""
    values: dict[str, object] = {name: getattr(config, name) for name in config.__dataclass_fields__}
    return {"_class_name": "TinySD3Transformer2DModel", **values, "num_layers": sum(map(bool, mask))}
