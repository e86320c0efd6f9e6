"""What is to be tuned: the launches of the networks, each distinct shape bucket of an operation once.

The calls are counted from the dispatch of the whole model on meta tensors, so no GPU and no weights are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.static.plan import calls
from benchmarks.subjects.networks import DTYPES, META, OWN_DTYPE, VARIANTS, network
from tinysr_kernels.checkpoint import Checkpoint, load
from tinysr_kernels.errors import InputError
from tinysr_kernels.families import Family
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.launch.plan import Implementation
from tinysr_kernels.nets import check_quantize, fold, to_fp8
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.linear.quantize import CAPABILITY
from tinysr_kernels.ops.registry import Cost, Operator
from tinysr_kernels.ops.trace import Call, ReadingOnes
from tinysr_kernels.runtime.compiled import CompiledSR


@dataclass(frozen=True)
class Target:
    """A model at one input size: a family at its public size, or a checkpoint.

    dtype None: the model's own on a GPU; variant None: the family's first (`benchmarks/subjects/networks.py`);
    quantize: None or "fp8", as in `compile`.
    """

    family: Family | None = None
    variant: str | None = None
    ckpt: str | None = None
    size: tuple[int, int] = (128, 128)
    batch: int = 1
    dtype: str | None = None
    quantize: str | None = None

    @property
    def name(self) -> str:
        """Identifies the target in files and tables."""
        model = f"{self.family} {self.variant or VARIANTS[self.family][0]}" if self.family else str(self.ckpt)
        dtype = self.dtype or (OWN_DTYPE[self.family] if self.family else "own dtype")
        quantize = f", {self.quantize}" if self.quantize else ""
        return f"{model}, {self.batch} x {self.size[0]}x{self.size[1]}, {dtype}{quantize}"


@dataclass(frozen=True)
class Item:
    """A shape bucket of an operation, by the call in it that takes longest; arguments are on meta tensors.

    calls: how often the bucket is called, over all targets together.
    """

    op: str
    bucket: str
    arguments: dict[str, Any]
    cost: Cost
    calls: int

    @property
    def key(self) -> str:
        """Identifies the item."""
        return f"{self.op} {self.bucket}"

    @property
    def implementation(self) -> Implementation:
        """The operation's kernels."""
        kernels = REGISTRY[self.op].kernels
        assert kernels is not None  # `items` makes none for other operations
        return kernels

    @property
    def bits(self) -> int:
        """Of what it multiplies, which the first floating tensor says; 16 where there is none, as networks compute."""
        floating = (v for v in self.arguments.values() if isinstance(v, Tensor) and v.is_floating_point())
        first = next(floating, None)
        return 16 if first is None else 8 * first.dtype.itemsize


def model_of(target: Target) -> CompiledSR:
    """The target's model on meta tensors. CheckpointError, InputError or ValueError where there is none."""
    if target.family is not None:
        model = network(target.family, target.variant, DTYPES[target.dtype] if target.dtype else None)
    else:
        checkpoint = load(str(target.ckpt))
        dtype = DTYPES[target.dtype or OWN_DTYPE[checkpoint.family]]
        tensors = {name: t.to(META) for name, t in checkpoint.tensors.items()}
        with ReadingOnes():
            folded = tensors if checkpoint.folded else fold(checkpoint.family, checkpoint.config, tensors, dtype)
        model = _model(checkpoint, folded, dtype)
    if target.quantize is None:
        return model
    check_quantize(model.family)
    source = Checkpoint(model.family, model.config, {}, source="shapes alone")
    return _model(source, to_fp8(model._folded), model.dtype)


def _model(checkpoint: Checkpoint, folded: dict[str, Tensor], dtype: torch.dtype) -> CompiledSR:
    return CompiledSR(
        Checkpoint(checkpoint.family, checkpoint.config, {}, source=checkpoint.source),
        folded,
        device=META,
        dtype=dtype,
        backend="triton",
        color_fix=checkpoint.config.color_fix,
        upscale=4,
        tile=1 << 20,  # the image whole
    )


def calls_of(target: Target, gpu: Gpu, *, plan_launches: bool = False) -> list[Call]:
    """Every call of the target's model in order; on request with the launches that it would make on the GPU.

    InputError where the GPU has no arithmetic of the kind.
    """
    if target.quantize and gpu.capability < CAPABILITY:
        raise InputError(
            f"--quantize {target.quantize} needs sm_{10 * CAPABILITY[0] + CAPABILITY[1]}, found {gpu.name}"
        )
    return calls(model_of(target), *target.size, target.batch, gpu, plan_launches=plan_launches)


def tunable(call: Call) -> Operator | None:
    """The call's operator if kernels compute it."""
    operator = REGISTRY.get(call.op)
    if operator is None or operator.kernels is None or not operator.kernels.takes(call.arguments):
        return None
    return operator


def items(found: Iterable[Call]) -> list[Item]:
    """One item for each (operation, bucket) among the calls, in order of first occurrence."""
    groups: dict[tuple[str, str], list[Call]] = {}
    for call in found:
        operator = tunable(call)
        if operator is not None and operator.kernels is not None:
            groups.setdefault((call.op, operator.kernels.bucket(**call.arguments)), []).append(call)
    made = []
    for (op, bucket), same in groups.items():
        longest = max(same, key=_weight)
        made.append(Item(op, bucket, dict(longest.arguments), longest.cost, len(same)))
    return made


def _weight(call: Call) -> tuple[int, int]:
    return call.cost.bytes, call.cost.flops


def all_items(targets: Sequence[Target], gpu: Gpu) -> list[Item]:
    """The items of several targets together."""
    return items(call for target in targets for call in calls_of(target, gpu))
