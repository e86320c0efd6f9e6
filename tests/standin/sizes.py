"""The families at many image sizes through the launch path of a GPU: what is specialized, compiled and launched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.static.machine_code import Variant, variant
from benchmarks.subjects.networks import VARIANTS, network
from tests.standin.driver import Driver, standing_in
from tinysr_kernels.launch import guard
from tinysr_kernels.launch.device import GPUS, assume
from tinysr_kernels.launch.plan import GRID_LIMITS, Launch
from tinysr_kernels.ops.call import REGISTRY
from tinysr_kernels.ops.trace import ReadingOnes

SMALL = ((1, 1), (1, 7), (3, 2), (8, 8), (16, 16), (17, 33))
ORDINARY = (
    (64, 110), (85, 128), (88, 156), (96, 96), (100, 75), (116, 206), (128, 128), (144, 256), (164, 219), (183, 326),
    (200, 150), (219, 164), (240, 320), (256, 256), (290, 218), (317, 423), (373, 373), (400, 300), (480, 270),
    (512, 512),
)  # fmt: skip
FAMILIES = tuple((family, variants[0]) for family, variants in VARIANTS.items())
MOST = {"tinysr-dit": 60, "adcsr": 540, "osediff": 270, "tsd-sr": 180, "tinysr-unet": 190}
"""Kernels that a family may compile for SMALL and ORDINARY together, with all color fixes for the first size."""


@dataclass
class Seen:
    """What a family's images launched on the stand-in.

    compiled: distinct kernels. faults: what a GPU, or the static check, would have met otherwise, one line each.
    """

    images: int = 0
    launches: int = 0
    compiled: int = 0
    faults: list[str] = field(default_factory=list)


class _Launching(ReadingOnes):
    """Operators run as on a GPU, on tensors without data."""

    def atomic(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Launch the operator's kernels; another operation has none of ours."""
        if func.namespace == "tinysr":
            return REGISTRY[func._schema.name.removeprefix("tinysr::")](*args, **kwargs).compute()
        return func(*args, **kwargs)


def specialized(source: Any, options: dict[str, Any], arch: int) -> Variant:
    """What Triton's binder made of a launch, in the words of the static check."""
    names = source.fn.arg_names
    constants = {names[path[0]]: value for path, value in source.constants.items()}
    aligned = {names[path[0]] for path, attributes in source.attrs.items() if attributes}
    return Variant(
        arch,
        source.fn.__module__,
        source.fn.__qualname__,
        tuple(source.signature.items()),
        tuple((name, constants[name]) for name in names if name in constants),
        tuple(name for name in names if name in aligned),
        options["num_warps"],
        options["num_stages"],
    )


def run(family: str, name: str, sizes: Iterable[tuple[int, int]], stop: str = "ttir", arch: int = 90) -> Seen:
    """Enlarge one image of each size, with each color fix for the first."""
    found = Seen()
    made: list[Variant] = []
    predicted: set[Variant] = set()
    launch_now = Launch.run

    def launch(self: Launch, pdl: bool = False) -> None:
        before = len(made)
        launch_now(self, pdl)
        expected = variant(arch, self)
        if len(made) > before and made[-1] != expected:
            found.faults.append(f"the static check predicts {_difference(expected, made[-1])}")
        if len(made) == before and expected not in predicted:
            found.faults.append(f"{expected.kernel}: the static check expects another kernel than Triton reuses")
        predicted.add(expected)

    driver = Driver(arch)
    model = network(family, name)
    fixes = (model.color_fix, *({"adain", "wavelet", "none"} - {model.color_fix}))
    with (
        pytest.MonkeyPatch.context() as patch,
        standing_in(driver, stop, lambda source, options: made.append(specialized(source, options, arch))),
        assume(GPUS[arch]),
        torch.inference_mode(),
        _Launching(),
    ):
        patch.setattr(Launch, "run", launch)
        patch.setenv(guard.SWITCH, "0")  # a kernel that fails shall show, not be replaced
        for i, size in enumerate(sizes):
            for fix in fixes if i == 0 else fixes[:1]:
                model.color_fix = fix
                image = torch.empty((1, 3, *size), dtype=torch.uint8, device="meta")
                try:
                    model.enlarge(image)
                except Exception as error:  # noqa: BLE001  whatever a GPU's user would have met
                    found.faults.append(f"{size}: {type(error).__name__}: {error}"[:2000])
            found.images += 1
    found.launches, found.compiled = len(driver.launches), len(made)
    found.faults += [f"{kernel}: grid {grid}" for kernel, grid, _ in driver.launches if not _exists(grid)]
    return found


def too_many(family: str, seen: Seen) -> list[str]:
    """The fault of a family that compiles more kernels for all sizes than it may."""
    most = MOST[family]
    return [f"{seen.compiled} kernels, at most {most} are expected"] if seen.compiled > most else []


def _exists(grid: tuple[int, ...]) -> bool:
    return all(1 <= size <= most for size, most in zip(grid, GRID_LIMITS, strict=True))


def _difference(expected: Variant, found: Variant) -> str:
    """The fields in which two variants differ."""
    pairs = ((name, getattr(expected, name), getattr(found, name)) for name in vars(expected))
    return "; ".join(f"{expected.kernel}.{name}: {a} instead of {b}" for name, a, b in pairs if a != b)
