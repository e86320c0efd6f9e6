"""LoRA: low-rank updates read from a file, named after the modules they belong to, and merged into the weights.

W += scale * (B.flatten(1) @ A.flatten(1)).reshape(W), in float32 or wider, for a linear layer or a convolution of any
rank. Names as peft and diffusers write them: `[base_model.model.][transformer.]<module>.lora_A[.default].weight`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint.read.paths import Released, aligned, parse_json, read_json
from tinysr_kernels.checkpoint.read.tensor_file import TensorFile
from tinysr_kernels.checkpoint.read.text import quoted, shape_text
from tinysr_kernels.checkpoint.read.weights import Weights
from tinysr_kernels.errors import CheckpointError

NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[A-Za-z0-9_-]+))?\.weight$")
PREFIXES = ("base_model.model.", "module.", "transformer.")


@dataclass(frozen=True)
class Update:
    """One module's low-rank update; A [r,I,...], B [O,r,...]."""

    a: Tensor
    b: Tensor
    scale: float
    where: str


def is_lora_name(name: str) -> bool:
    """Whether a stored name belongs to a LoRA's half."""
    return NAME.match(name) is not None


def read_updates(file: TensorFile, alpha: float | None = None) -> dict[str, Update]:
    """The updates of a LoRA file by module name, prefixes stripped.

    alpha: that of a LoRA whose files do not state it; each update's scale is then alpha / its rank.
    Raises CheckpointError for a key that is no half of an update, for a half without its other half, for two adapters
    on one module, and for halves whose ranks differ.
    """
    halves: dict[str, dict[str, str]] = {}
    for key in file.only_tensors():
        found = NAME.match(key)
        if not found:
            raise CheckpointError(
                f"{file.where}: {quoted(key)}: expected <module>.lora_A.weight or <module>.lora_B.weight"
            )
        sides = halves.setdefault(_module(found["module"]), {})
        if found["side"] in sides:
            raise CheckpointError(
                f"{file.where}: {quoted(key)}: a second adapter on this module beside "
                f"{quoted(sides[found['side']])}; keep one"
            )
        sides[found["side"]] = key
    scale = _scale(file) if alpha is None else None
    updates = {module: _update(file, module, sides, scale or 1.0) for module, sides in halves.items()}
    if alpha is not None:
        updates = {name: replace(update, scale=alpha / update.a.shape[0]) for name, update in updates.items()}
    return updates


def _module(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _update(file: TensorFile, module: str, sides: dict[str, str], scale: float) -> Update:
    for side in "AB":
        if side not in sides:
            raise CheckpointError(f"{file.where}: {quoted(module)}: expected lora_A and lora_B, found no lora_{side}")
    pair = Weights({key: file.tensors[key] for key in sides.values()}, file.where)
    rank = (*pair.shape(sides["A"]), 0)[0]
    a = pair.take(sides["A"], [rank or None, *pair.shape(sides["A"])[1:]])
    b_shape = pair.shape(sides["B"])
    b = pair.take(sides["B"], [None, rank, *(1 for _ in b_shape[2:])])
    return Update(aligned(a), aligned(b), scale, f"{file.where}: {quoted(sides['B'])}")


def summed(parts: Sequence[Mapping[str, Update]], weights: Sequence[float]) -> dict[str, Update]:
    """Several LoRA as one, each times its weight: the sum of a module's updates is an update of the ranks' sum."""
    found: dict[str, Update] = {}
    for part, weight in zip(parts, weights, strict=True):
        for module, update in part.items():
            wide = torch.promote_types(torch.promote_types(update.a.dtype, update.b.dtype), torch.float32)
            a, b = update.a.to(wide), update.b.to(wide) * (update.scale * weight)
            if module in found:
                other = found[module]
                if other.a.shape[1:] != a.shape[1:] or other.b.shape[0] != b.shape[0]:
                    raise CheckpointError(
                        f"{update.where}: expected an update of the shape that {other.where} has, found "
                        f"{shape_text(update.a.shape)} and {shape_text(update.b.shape)}"
                    )
                a, b = torch.cat([other.a, a]), torch.cat([other.b, b], 1)
            found[module] = Update(a, b, 1.0, update.where)
    return found


def states_alpha(file: TensorFile) -> bool:
    """Whether a LoRA file's metadata, or adapter_config.json beside it, state rank and alpha."""
    _, values = _stated(file)
    return values.get("lora_alpha") is not None and values.get("r") is not None


def _stated(file: TensorFile) -> tuple[str, dict[str, Any]]:
    """What the file's own metadata or peft's adapter_config.json beside it say, and where that is."""
    where = f"{file.where}: lora_adapter_metadata"
    if "lora_adapter_metadata" in file.metadata:
        values = parse_json(file.metadata["lora_adapter_metadata"].encode("utf-8", "surrogatepass"), where)
        return where, {name.removeprefix("transformer."): value for name, value in values.items()}
    if file.path.is_file() and (config := file.path.parent / "adapter_config.json").is_file():
        return str(config), read_json(config)
    return where, {}


def _scale(file: TensorFile) -> float:
    """alpha / rank, 1 unless what is stated with the file says otherwise."""
    where, values = _stated(file)
    if values.get("alpha_pattern") or values.get("rank_pattern") or values.get("use_rslora") or values.get("use_dora"):
        raise CheckpointError(
            f"{where}: scales that differ by module, rsLoRA and DoRA are not supported; merge it first"
        )
    alpha, rank = values.get("lora_alpha"), values.get("r")
    if alpha is None or rank is None:
        return 1.0
    if not all(type(v) in (int, float) and 1e-3 <= v <= 1e6 for v in (alpha, rank)):
        raise CheckpointError(f"{where}: expected positive lora_alpha and r, found {quoted(alpha)} and {quoted(rank)}")
    return float(alpha) / float(rank)


def merge(weights: dict[str, Tensor], updates: Mapping[str, Update]) -> None:
    """Merge updates into `<module>.weight`, in place in the dict; the merged tensors are float32, float64 stays so.

    Raises CheckpointError for a module that is not there and for shapes that do not fit.
    """
    for module, update in updates.items():
        name = f"{module}.weight"
        if name not in weights:
            raise CheckpointError(f"{update.where}: there is no module {quoted(module)} in the network that it adapts")
        weights[name] = merged(weights[name], update)


class Merged(Mapping[str, Tensor]):
    """Tensors with their updates merged on demand, so that a large network is never in memory twice."""

    def __init__(self, tensors: Mapping[str, Tensor], updates: Mapping[str, Update], base: str = "") -> None:
        """Raises CheckpointError for a module that is not there and for shapes that do not fit.

        base: where the tensors come from, for messages.
        """
        self._tensors = Released(dict(tensors))
        self._updates: dict[str, Update] = {}
        for module, update in updates.items():
            name = f"{module}.weight"
            if name not in tensors:
                raise CheckpointError(
                    f"{update.where}: there is no module {quoted(module)} in the network that it adapts {base}; "
                    "does it belong to another base model?"
                )
            check_fits(tensors[name], update, base)
            self._updates[name] = update

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return merged(tensor, self._updates[name]) if name in self._updates else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def check_fits(weight: Tensor, update: Update, base: str = "") -> None:
    """CheckpointError unless an update has the shape of a weight; base: where that comes from, for the message."""
    a, b = update.a, update.b
    if b.shape[0] != weight.shape[0] or a.shape[1:] != weight.shape[1:]:
        fitting_a, fitting_b = shape_text([None, *weight.shape[1:]]), shape_text([weight.shape[0], None])
        raise CheckpointError(
            f"{update.where}: expected A {fitting_a} and B {fitting_b} for a weight {shape_text(weight.shape)} "
            f"{base}, found {shape_text(a.shape)} and {shape_text(b.shape)}; does it belong to another base model?"
        )


def merged(weight: Tensor, update: Update) -> Tensor:
    """One merged weight; float32, or float64 where the weight or the update is."""
    check_fits(weight, update)
    a, b = update.a, update.b
    wide = torch.float64 if torch.float64 in (weight.dtype, a.dtype, b.dtype) else torch.float32
    product = b.flatten(1).to(wide) @ a.flatten(1).to(wide)
    return product.mul_(update.scale).reshape(weight.shape).add_(weight)


def split_wrapped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the LoRA halves of a state dict saved while a peft adapter was attached."""
    base = {k.replace(".base_layer.", "."): v for k, v in tensors.items() if not is_lora_name(k)}
    return base, {k: v for k, v in tensors.items() if is_lora_name(k)}


def drop(updates: dict[str, Update], modules: Iterable[str]) -> list[str]:
    """Remove the updates of these modules; returns those that were there."""
    gone = [module for module in modules if module in updates]
    for module in gone:
        del updates[module]
    return gone
