"""What is to be tuned: the launches of the networks, each distinct shape bucket of an operation once.

The calls are counted from the dispatch of the whole model on meta tensors, so no GPU and no weights are needed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.static.plan import calls
from benchmarks.subjects.families import META
from benchmarks.subjects.networks import DTYPES, OWN_DTYPE, VARIANTS, network
from tinysr_kernels.errors import InputError
from tinysr_kernels.families import FAMILIES, Checkpoint, check_quantize, fold, load
from tinysr_kernels.launch.device import Gpu
from tinysr_kernels.ops import Cost, Operator
from tinysr_kernels.ops.linear.quantize import CAPABILITY
from tinysr_kernels.ops.trace import Call, ReadingOnes
from tinysr_kernels.runtime.compiled import CompiledSR


@dataclass(frozen=True)
class Target:
    """A model at one input size: a family at its public size, or a checkpoint.

    dtype None: the model's own on a GPU; variant None: the family's first (`benchmarks/subjects/families.py`);
    quantize: None or "fp8", as in `compile`.
    """

    family: str | None = None
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


@dataclass(frozen=True, eq=False)
class Item:
    """A shape bucket of an operator, by the call in it that takes longest, on meta tensors.

    calls: how often the bucket is called, over all targets together.
    """

    call: Operator
    calls: int

    @property
    def op(self) -> str:
        """The operator's name."""
        return self.call.name

    @functools.cached_property
    def bucket(self) -> str:
        """The bucket."""
        return self.call.bucket()

    @functools.cached_property
    def cost(self) -> Cost:
        """FLOPs and bytes of a call."""
        return self.call.cost()

    @property
    def key(self) -> str:
        """Identifies the item."""
        return f"{self.op} {self.bucket}"

    @property
    def bits(self) -> int:
        """Of what it multiplies, which the first floating tensor says; 16 where there is none, as networks compute."""
        floating = (v for v in self.call.tensors if v.is_floating_point())
        first = next(floating, None)
        return 16 if first is None else 8 * first.dtype.itemsize


def model_of(target: Target) -> CompiledSR:
    """The target's model on meta tensors. CheckpointError, InputError or ValueError where there is none."""
    if target.family is not None:
        model = network(target.family, target.variant, DTYPES[target.dtype] if target.dtype else None)
    else:
        checkpoint = load(str(target.ckpt))
        dtype = DTYPES[target.dtype or FAMILIES[checkpoint.family].dtype]
        tensors = {name: t.to(META) for name, t in checkpoint.tensors.items()}
        with ReadingOnes():
            folded = tensors if checkpoint.folded else fold(checkpoint.family, checkpoint.config, tensors, dtype)
        model = _model(checkpoint, folded, dtype)
    if target.quantize is None:
        return model
    check_quantize(model.family, target.quantize)
    source = Checkpoint(model.family, model.config, {}, source="shapes alone")
    return _model(source, FAMILIES[model.family].quantize(model._folded, target.quantize), model.dtype)


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
    return calls_of_model(model_of(target), target, gpu, plan_launches=plan_launches)


def calls_of_model(model: CompiledSR, target: Target, gpu: Gpu, *, plan_launches: bool = False) -> list[Call]:
    """Every call of a model that is there already (`model_of`), at the target's size and batch."""
    return calls(model, *target.size, target.batch, gpu, plan_launches=plan_launches)


def items(found: Iterable[Call]) -> list[Item]:
    """One item per (operator, bucket) among the calls that kernels compute, in order of first occurrence."""
    groups: dict[tuple[str, str], list[Call]] = {}
    for call in found:
        operator = tunable(call)
        if operator is not None:
            groups.setdefault((call.op, operator.bucket()), []).append(call)
    return [Item(operator, len(same)) for same in groups.values() if (operator := max(same, key=_weight).operator)]


def tunable(call: Call) -> Operator | None:
    """The call of an operator, if kernels compute it."""
    return call.operator if call.operator is not None and call.operator.kernels_apply else None


def _weight(call: Call) -> tuple[int, int]:
    return call.cost.bytes, call.cost.flops


def all_items(targets: Sequence[Target], gpu: Gpu) -> list[Item]:
    """The items of several targets together."""
    return items(call for target in targets for call in calls_of(target, gpu))
