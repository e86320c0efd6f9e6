"""How many kernel variants Triton compiles as sizes of images change, and which of their integers it specializes.

A variant takes about half a second to compile: what a new size costs, a user waits for.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import pytest
import torch
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from benchmarks.static.machine_code import Variant, variant
from benchmarks.static.plan import calls
from benchmarks.subjects.networks import network
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.kernel import extent, extent_or_1, jit, tl
from tinysr_kernels.launch.plan import Launch

GPU = GPUS[90]
ASPECTS = (1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3)
BOUNDS = {
    ("tinysr-unet", "demo"): (6, 48, 40, 56),
    ("tinysr-dit", "separable"): (6, 28, 40, 31),
    ("adcsr", "released"): (4, 138, 20, 188),
}
"""Variants for so many of `ordinary_sizes`: few of them, and all."""


@functools.cache
def model(family: str, name: str) -> Any:
    return network(family, name)


def ordinary_sizes(count: int) -> list[tuple[int, int]]:
    """128x128, then sizes of the usual aspects, the same at every run."""
    draw = random.Random(1)
    sizes = [(128, 128)]
    while len(sizes) < count:
        width, aspect = draw.randint(96, 400), draw.choice(ASPECTS)
        sizes.append((max(64, round(width / aspect)), width))
    return sizes


def variants(of: Any, sizes: list[tuple[int, int]], batch: int = 1) -> set[Variant]:
    """What Triton compiles for images of these sizes, one after the other."""
    found: set[Variant] = set()
    for size in sizes:
        for call in calls(of, *size, batch, GPU, plan_launches=False):
            if call.operator is not None:
                with assume(GPU), torch.inference_mode():
                    plan, _ = call.operator.planned()
                found |= {variant(GPU.arch, launch) for launch in plan.launches if isinstance(launch, Launch)}
    return found


@pytest.mark.parametrize(("family", "name"), BOUNDS)
def test_sizes_share_variants(family: str, name: str) -> None:
    few, bound, _, _ = BOUNDS[family, name]
    assert 20 < len(variants(model(family, name), ordinary_sizes(few))) <= bound


@pytest.mark.long
@pytest.mark.parametrize(("family", "name"), BOUNDS)
def test_many_sizes_share_variants(family: str, name: str) -> None:
    _, _, many, bound = BOUNDS[family, name]
    assert len(variants(model(family, name), ordinary_sizes(many))) <= bound


def test_tiled_images_compile_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit all tiles have one size: only the kernels of the whole image meet new numbers."""
    tiled = model("tinysr-unet", "demo")
    monkeypatch.setattr(tiled._runner, "limits", dataclasses.replace(tiled._runner.limits, tile=160))
    met = variants(tiled, [(360, 500)])
    new = variants(tiled, [(333, 777)]) - met
    assert len(met) <= 52
    assert len(new) <= 3
    assert not {one.kernel for one in new} & {"march", "tile", "single", "from_moments"}


@jit
def _mixed(a, b: extent, c: extent_or_1, D: tl.constexpr):  # type: ignore[no-untyped-def]
    pass


@pytest.mark.parametrize("value", [-16, 0, 1, 2, 16, 17, 1 << 31, 1 << 32])
def test_what_is_specialized(value: int) -> None:
    launch = Launch(_mixed, (1,), {"a": value, "b": value, "c": value, "D": value}, 4, 1)
    found = variant(90, launch)
    kind, one, aligned = "i32" if value < 1 << 31 else "i64", value == 1, value % 16 == 0
    assert dict(found.signature) == {
        "a": "constexpr" if one else kind,
        "b": kind,
        "c": "constexpr" if one else kind,
        "D": "constexpr",
    }
    assert set(dict(found.constants)) == {"D"} | ({"a", "c"} if one else set())
    assert found.aligned == (("a",) if aligned else ())
    assert by_triton(launch) == as_bound(found)


@pytest.mark.parametrize(("family", "name"), BOUNDS)
def test_launches_are_specialized_as_triton_does_it(family: str, name: str) -> None:
    """Else the counts above, and what `benchmarks static` compiles, are not what a GPU runs."""
    seen = set()
    for call in calls(model(family, name), 100, 131, 1, GPU, plan_launches=False):
        if call.operator is not None:
            with assume(GPU), torch.inference_mode():
                plan, _ = call.operator.planned()
            for launch in plan.launches:
                if isinstance(launch, Launch) and launch.kernel not in seen:
                    seen.add(launch.kernel)
                    assert by_triton(launch) == as_bound(variant(GPU.arch, launch))
    assert len(seen) >= 8


def as_bound(found: Variant) -> dict[str, tuple[str, bool]]:
    """Per argument its type and whether 16 is known to divide it."""
    return {name: (kind, name in found.aligned) for name, kind in found.signature}


def by_triton(launch: Launch) -> dict[str, tuple[str, bool]]:
    """The same by the binder that Triton makes for the kernel."""
    made = JITFunction(launch.kernel.function, **launch.kernel.options)
    binder = create_function_from_signature(made.signature, made.params, CUDABackend)
    _, specialization, _ = binder(**launch.arguments)
    kinds = dict(zip(made.arg_names, specialization, strict=True))
    return {name: (kind, kind != "constexpr" and key == "D") for name, (kind, key) in kinds.items()}
