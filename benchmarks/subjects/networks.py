"""The families at their public sizes, compiled on meta tensors: shapes without weights, memory or time."""

from __future__ import annotations

import torch

from benchmarks.subjects.families import META, SUBJECTS, Named
from tinysr_kernels.families import FAMILIES, Checkpoint, ColorFix, fold
from tinysr_kernels.ops.trace import ReadingOnes
from tinysr_kernels.runtime.compiled import CompiledSR

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OWN_DTYPE = {name: FAMILIES[name].dtype for name in SUBJECTS}
"""The dtype that `compile` chooses on a GPU."""
VARIANTS = {name: subject.variants for name, subject in SUBJECTS.items()}
"""Per family the networks it comes in, the one that counts first. TinySR's are named after their decoder; "fp8" is the
separable one with the transformer in e4m3."""


def network(
    family: str, variant: str | None = None, dtype: torch.dtype | None = None, color_fix: ColorFix | None = None
) -> CompiledSR:
    """The compiled model on meta tensors.

    variant: one of VARIANTS[family], by default the first; dtype and color_fix: by default the family's own.
    ValueError for an unknown variant.
    """
    variant = variant or VARIANTS[family][0]
    config, tensors = named_tensors(family, variant)
    dtype = dtype or DTYPES[OWN_DTYPE[family]]
    with ReadingOnes():
        folded = fold(family, config, tensors, dtype, SUBJECTS[family].quantized.get(variant))
    return CompiledSR(
        Checkpoint(family, config, tensors, source="shapes alone"),
        folded,
        device=META,
        dtype=dtype,
        backend="reference",  # plans nothing by itself
        color_fix=color_fix or config.color_fix,
        upscale=4,
        tile=1 << 20,  # the image whole: how much fits depends on a memory that is not there
    )


def named_tensors(family: str, variant: str, reduced: bool = False) -> Named:
    """The configuration and the normalized checkpoint on meta tensors. ValueError for an unknown variant.

    reduced: the same structure at a size that a CPU runs in a moment; TinySR's images are 32x32 then at least.
    """
    if variant not in VARIANTS[family]:
        raise ValueError(f"{family} comes as {VARIANTS[family]}, found {variant!r}")
    return SUBJECTS[family].shapes(variant, reduced)
