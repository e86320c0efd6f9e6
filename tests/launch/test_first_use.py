"""What the interpreter hides and a first run on a GPU would meet: grids, integers of one, captures.

The families at many sizes: tests/standin/.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks.static.machine_code import Variant, compile_all, front_end_error, variant
from benchmarks.static.network_calls import CALLS
from benchmarks.static.plan import calls
from benchmarks.subjects.networks import VARIANTS, network
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.kernel import jit
from tinysr_kernels.launch.plan import GRID_LIMITS, Launch
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.runtime.images.arrays import DEVICE_PIXELS
from tinysr_kernels.runtime.tiles.limits import BATCH_IMAGES, BATCH_PIXELS, Limits

FAMILIES = [(family, variants[0]) for family, variants in VARIANTS.items()]


@functools.cache
def model(family: str, name: str) -> Any:
    return network(family, name)


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_the_largest_batch_has_grids_that_exist(family: str, name: str) -> None:
    """A batch holds many images of a pixel."""
    assert Limits(batch_pixels=BATCH_PIXELS).images(1) == BATCH_IMAGES
    for size in ((1, 1), (32, 32)):
        assert calls(model(family, name), *size, batch=BATCH_IMAGES)


@pytest.mark.parametrize("size", [(DEVICE_PIXELS // 16, 1), (1, DEVICE_PIXELS // 16)])
@pytest.mark.parametrize("op", ["adain_fix", "wavelet_fix", "clamp_image", "resize_bicubic"])
def test_images_of_one_column_or_row(op: str, size: tuple[int, int]) -> None:
    """The operators on whole images meet all the rows there are."""
    image = torch.empty((1, 3, 4 * size[0], 4 * size[1]), dtype=torch.float16, device="meta")
    small = torch.empty((1, 3, *size), dtype=torch.uint8, device="meta")
    arguments: dict[str, tuple[Any, ...]] = {
        "adain_fix": (image, small, 1e-5, 1 / 255),
        "wavelet_fix": (image, small, 4),
        "clamp_image": (image,),
        "resize_bicubic": (small, 4),
    }
    plan, _ = REGISTRY[op](*arguments[op]).planned()
    assert plan.launches


@pytest.mark.parametrize("grid", [(1, 65536), (1, 1, 65536), (1 << 31,)])
def test_a_grid_beyond_the_limits(grid: tuple[int, ...]) -> None:
    @jit
    def kernel(x):
        return x

    with pytest.raises(ValueError, match="split the batch"):
        Launch(kernel, grid, {}, 4, 1)
    Launch(kernel, GRID_LIMITS, {}, 4, 1)


def _with_ones() -> dict[Any, Variant]:
    """Each kernel, with each set of its optional tensors, all of its integers 1: Triton makes constants of them."""
    found: dict[Any, Variant] = {}
    gpu = GPUS[90]
    for op in CALLS:
        for call in CALLS[op](torch.float16):
            with assume(gpu):
                plan, _ = call.planned()
            for launch in plan.launches:
                if not isinstance(launch, Launch):
                    continue
                kernel, arguments = launch.kernel, dict(launch.arguments)
                absent = tuple(name for name, value in arguments.items() if value is None)
                for name, value in arguments.items():
                    if type(value) is int and name not in kernel.constants:
                        arguments[name] = 1
                key = (kernel.function.__module__, kernel.function.__name__, absent)
                if key not in found:
                    found[key] = variant(gpu.arch, dataclasses.replace(launch, arguments=arguments))
    return found


def test_kernels_compile_when_their_integers_are_one() -> None:
    variants = _with_ones()
    assert len({key[:2] for key in variants}) >= 30
    errors = compile_all(variants.values(), 1, None, front_end_error)
    assert {key: error for key, error in zip(variants, errors, strict=True) if error} == {}


FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, torch.Tensor.new_tensor}


class _HostData(TorchFunctionMode):
    """Refuses tensors made from Python numbers: the copy to the GPU ends the capture of a CUDA graph."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in FROM_HOST, "a tensor made from host data"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", ["library", "reference"])
@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_other_forms_can_be_captured(op: str, form: str) -> None:
    """On GPUs without kernels the library forms are captured, and the references in float64."""
    for call in itertools.islice(CALLS[op](torch.float16), 4):
        with _HostData():
            getattr(call, form)()


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_networks_can_be_captured(family: str, name: str) -> None:
    """What lies between the operators, with every color fix."""
    one = model(family, name)
    image = torch.empty((1, 3, 128, 128), dtype=torch.uint8, device="meta")
    for color_fix in ("adain", "wavelet", "none"):
        before, one.color_fix = one.color_fix, color_fix
        try:
            with _HostData():
                assert one.enlarge(image).shape == (1, 3, 512, 512)
        finally:
            one.color_fix = before


def test_host_data_is_seen() -> None:
    with _HostData(), pytest.raises(AssertionError, match="host data"):
        torch.tensor([1.0, 2.0], device="meta")
