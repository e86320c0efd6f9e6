"""TinySR's transformer: SD3's image stream, checked, with LoRA merged and its modulation evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor

from tinysr_kernels.checkpoint import modulation
from tinysr_kernels.checkpoint.embeddings import Candidate, Conditioning, checked, position_table, prefer, recognize
from tinysr_kernels.checkpoint.lora import Update, drop, merge, read_updates, split_wrapped
from tinysr_kernels.checkpoint.modulation import BLOCK_PARTS, EMBEDDER, OUT_PARTS
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import listed, quoted
from tinysr_kernels.checkpoint.read.weights import Weights, linear
from tinysr_kernels.errors import CheckpointError

WINDOW = 64  # latent pixels per side that the released network was trained for
CONTEXT_STREAM = re.compile(
    r"(^|\.)(context_embedder|attn2?\.(add_[qkv]_proj|to_add_out|norm_added_[qk])|ff_context|norm1_context)(\.|$)"
)


@dataclass
class Parts:
    """What a TinySR transformer is made of, as found; `config` is None for a module that has none."""

    weights: TensorFile
    config: dict[str, Any] | None
    config_where: str
    lora: TensorFile | None
    given: Sequence[Candidate]
    """Embeddings that the caller named; they take precedence over those found in the checkpoint."""
    found: Sequence[Candidate]


@dataclass(frozen=True)
class Geometry:
    """The sizes that the weights and the configuration agree on."""

    dim: int
    depth: int
    channels: int
    patch: int
    head_dim: int


def normalize(parts: Parts, notices: list[str]) -> tuple[dict[str, Tensor], Geometry]:
    """The transformer's tensors under their public names, conditioning replaced by modulation.

    Raises CheckpointError naming file and key for whatever is missing, left over, of another shape or contradictory.
    """
    tensors, wrapped = split_wrapped(_without_prefix(parts.weights.only_tensors()))
    updates = _updates(parts.lora, wrapped, parts.weights, notices)
    left_over = [name for name in tensors if CONTEXT_STREAM.search(name)]
    if left_over:
        notices.append(f"{parts.weights.where}: ignored {len(left_over)} left-over tensors of SD3's context stream")
    cached = _cached(tensors, parts.weights.where)
    weights = Weights({k: v for k, v in tensors.items() if k not in set(left_over)}, parts.weights.where)
    geometry = _geometry(weights, parts)
    _take_blocks(weights, geometry)
    out = _condition(weights, geometry, parts, updates, cached, notices)
    return out, geometry


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Strip what wraps every key alike: `module.` of DataParallel, `transformer.` of a pipeline, peft's own."""
    for prefix in ("module.", "base_model.model.", "transformer."):
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors


def _updates(
    lora: TensorFile | None, wrapped: dict[str, Tensor], weights: TensorFile, notices: list[str]
) -> dict[str, Update]:
    if wrapped and lora is not None:
        raise CheckpointError(f"{weights.where}: holds LoRA layers, and {lora.where} is a second LoRA; keep one")
    file = TensorFile(weights.path, wrapped) if wrapped else lora
    if file is None:
        return {}
    updates = read_updates(file)
    left_over = drop(updates, [module for module in updates if CONTEXT_STREAM.search(module)])
    if left_over:
        notices.append(f"{file.where}: ignored LoRA on {len(left_over)} modules of SD3's context stream")
    return updates


def _cached(tensors: dict[str, Tensor], where: str) -> bool:
    """Whether the modulation buffers are filled; CheckpointError if only some are."""
    names = {name for name in tensors if name.rpartition(".")[2] in BLOCK_PARTS} | ({*OUT_PARTS} & set(tensors))
    filled = {name for name in names if tensors[name].numel()}
    if filled and filled != names:
        raise CheckpointError(
            f"{where}: {listed(names - filled)}: expected filled like {quoted(min(filled))}, found empty"
        )
    return bool(filled)


def _geometry(weights: Weights, parts: Parts) -> Geometry:
    dim, channels, patch, second = weights.take("pos_embed.proj.weight", [None] * 4).shape
    if patch != second or patch > WINDOW:
        raise CheckpointError(
            f"{weights.where('pos_embed.proj.weight')}: patch of {patch} x {second}, expected a square of at most "
            f"{WINDOW}"
        )
    depth = weights.count("transformer_blocks")
    if not depth:
        raise CheckpointError(f"{weights.where('transformer_blocks.0')}: expected transformer blocks, found none")
    values = {} if parts.config is None else parts.config
    head_dim = values.get("attention_head_dim", 64)
    if not _positive(head_dim) or dim % head_dim:
        raise CheckpointError(
            f"{parts.config_where}: attention_head_dim: expected a divisor of the width {dim}, found {quoted(head_dim)}"
        )
    found = {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": depth,
        "num_attention_heads": dim // head_dim,
    }
    if weights.has(f"{EMBEDDER}.text_embedder.linear_1.weight"):
        shape = weights.shape(f"{EMBEDDER}.text_embedder.linear_1.weight")
        found["pooled_projection_dim"] = shape[-1] if shape else 0
    for name, size in found.items():
        if values.get(name) is not None and (type(values[name]) is not int or values[name] != size):
            raise CheckpointError(
                f"{parts.config_where}: {name}: the weights in {parts.weights.where} say {size}, "
                f"found {quoted(values[name])}"
            )
    return Geometry(dim, depth, channels, patch, head_dim)


def _positive(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= 1 << 16


def _take_blocks(weights: Weights, size: Geometry) -> None:
    weights.take("pos_embed.proj.bias", [size.dim])
    for i in range(size.depth):
        block = f"transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linear(weights, f"{block}.attn.{name}", size.dim, size.dim)
        hidden = linear(weights, f"{block}.ff.net.0.proj", size.dim)
        linear(weights, f"{block}.ff.net.2", hidden, size.dim)
    linear(weights, "proj_out", size.dim, size.patch**2 * size.channels)


def _condition(
    weights: Weights, size: Geometry, parts: Parts, updates: dict[str, Update], cached: bool, notices: list[str]
) -> dict[str, Tensor]:
    """Take what conditions the network, merge LoRA, evaluate: filled buffers, then pooled embedding, then temb."""
    modulated = [f"transformer_blocks.{i}.norm1.linear" for i in range(size.depth)] + ["norm_out.linear"]
    buffers = [f"transformer_blocks.{i}.{part}" for i in range(size.depth) for part in BLOCK_PARTS] + [*OUT_PARTS]
    pooled_dim = _text_inputs(weights, parts)
    embeddings = prefer(
        recognize(parts.given, size.dim, pooled_dim, strict=True), recognize(parts.found, size.dim, pooled_dim)
    )
    table = _table(weights, size, parts, embeddings, notices)
    embedders = [name for name in weights.names() if name.startswith(f"{EMBEDDER}.")]
    if cached:
        for name in buffers:
            weights.take(name, [1, size.dim])
        _ignore(weights, updates, modulated, notices, "its modulation is pre-cached")
        weights.ignore(embedders)
        if parts.given and (embeddings.pooled or embeddings.temb):
            notices.append("the embeddings given are ignored: the transformer's modulation is pre-cached")
        out = _merged(weights, updates)
        modulation.stack_cached(out, size.depth)
    else:
        weights.ignore(buffers)
        for name, rows in zip(modulated, [6] * size.depth + [2], strict=True):
            linear(weights, name, size.dim, rows * size.dim)
        if embeddings.pooled is not None and embedders:
            _take_embedders(weights, size)
            pooled = checked(embeddings.pooled, [1, pooled_dim])
            out = _merged(weights, updates)
            modulation.evaluate(out, size.depth, modulation.embed(out, pooled), pooled)
            out = {name: value for name, value in out.items() if not name.startswith(f"{EMBEDDER}.")}
        elif embeddings.temb is not None:
            temb = checked(embeddings.temb, [1, size.dim])
            _ignore(weights, updates, [], notices, "temb is pre-cached")
            weights.ignore(embedders)
            out = _merged(weights, updates)
            modulation.evaluate(out, size.depth, temb, temb)
        else:
            raise _unconditioned(parts, size, pooled_dim)
    out["pos_embed.pos_embed"] = table
    return out


def _text_inputs(weights: Weights, parts: Parts) -> int | None:
    name = f"{EMBEDDER}.text_embedder.linear_1.weight"
    if weights.has(name):
        return (*weights.shape(name), 0, 0)[1]
    declared = (parts.config or {}).get("pooled_projection_dim")
    return declared if _positive(declared) else None


def _take_embedders(weights: Weights, size: Geometry) -> None:
    for embedder in ("timestep_embedder", "text_embedder"):
        first = f"{EMBEDDER}.{embedder}.linear_1"
        inputs = (*weights.shape(f"{first}.weight"), 0, 0)[1]
        if embedder == "timestep_embedder" and (inputs < 2 or inputs % 2):
            raise CheckpointError(
                f"{weights.where(f'{first}.weight')}: expected an even number of inputs, found {inputs}"
            )
        hidden = linear(weights, first, inputs)
        linear(weights, f"{EMBEDDER}.{embedder}.linear_2", hidden, size.dim)


def _ignore(
    weights: Weights, updates: dict[str, Update], modulated: list[str], notices: list[str], reason: str
) -> None:
    """Set aside the modules that a cached result has replaced, and the LoRA on them."""
    gone = weights.ignore([f"{name}.{part}" for name in modulated for part in ("weight", "bias")])
    if gone:
        notices.append(f"{weights.where(min(gone))}: {len(gone)} modulation weights ignored, {reason}")
    replaced = [module for module in updates if module in modulated or module.startswith(f"{EMBEDDER}.")]
    dropped = drop(updates, replaced)
    if dropped:
        notices.append(f"LoRA on cached modulation ignored ({len(dropped)} modules): {reason}")


def _merged(weights: Weights, updates: dict[str, Update]) -> dict[str, Tensor]:
    out = dict(weights.finish())
    merge(out, updates)
    return out


def _unconditioned(parts: Parts, size: Geometry, pooled_dim: int | None) -> CheckpointError:
    seen = listed(f"{c.where} {list(c.tensor.shape)}" for c in (*parts.given, *parts.found)) or "no embedding at all"
    return CheckpointError(
        f"{parts.weights.where}: no conditioning: looked for filled modulation buffers, a pooled prompt embedding "
        f"[1, {pooled_dim or 'any'}] with {EMBEDDER} weights, and temb [1, {size.dim}]; found {seen}. Pass one with "
        "embeddings="
    )


def _table(weights: Weights, size: Geometry, parts: Parts, embeddings: Conditioning, notices: list[str]) -> Tensor:
    """The position table [1,T,D]: the weights' own, a file's, or computed from the configuration."""
    name = "pos_embed.pos_embed"
    if weights.has(name):
        table = weights.take(name, [1, None, size.dim])
    elif embeddings.table is not None:
        table = checked(embeddings.table, [1, None, size.dim])
    else:
        return _computed_table(weights, size, parts, notices)
    if math.isqrt(table.shape[1]) ** 2 != table.shape[1]:
        raise CheckpointError(f"{weights.where(name)}: expected a square table, found {table.shape[1]} tokens")
    return table


def _computed_table(weights: Weights, size: Geometry, parts: Parts, notices: list[str]) -> Tensor:
    values = parts.config or {}
    full, sample = values.get("pos_embed_max_size"), values.get("sample_size")
    side = WINDOW // size.patch
    if not _positive(full) or not _positive(sample):
        raise CheckpointError(
            f"{weights.where('pos_embed.pos_embed')}: expected this tensor, a position table [1, T, {size.dim}] beside "
            f"the weights, or pos_embed_max_size and sample_size in {parts.config_where}; found none of them"
        )
    base = sample // size.patch
    if full < side or base < 1 or size.dim % 4:
        raise CheckpointError(
            f"{parts.config_where}: pos_embed_max_size: expected at least {side}, found {full} "
            f"(sample_size {sample}, patch_size {size.patch}, width {size.dim})"
        )
    notices.append(f"{parts.weights.where}: position table computed from pos_embed_max_size {full}")
    return position_table(size.dim, side, base, full)
