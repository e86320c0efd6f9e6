"""All families through the launch path of a GPU, on a stand-in for Triton's driver (`driver.py`)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.standin import child
from tests.standin.sizes import FAMILIES, ORDINARY, SMALL


@pytest.fixture(scope="module")
def bound() -> Any:
    """All sizes, up to Triton's binder."""
    return child.run("tests.standin", "--json", "--stop", "signature")


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES])
def test_every_size_is_launched(bound: Any, family: str) -> None:
    """Grids exist, and Triton's binder specializes as `benchmarks static` predicts."""
    seen = bound[family]
    assert seen["faults"] == []
    assert seen["images"] == len(SMALL + ORDINARY)
    assert seen["launches"] > 20 * seen["images"]
    assert seen["compiled"] >= 20


@pytest.mark.long
@pytest.mark.parametrize("arch", ["80", "120"])
def test_small_sizes_are_compiled(arch: str) -> None:
    """By Triton's front end, which meets integers of one as constants, on the oldest and on the newest architecture."""
    seen = child.run("tests.standin", "--json", "--sizes", "few", "--arch", arch)
    assert {family: seen[family]["faults"] for family, _ in FAMILIES} == {family: [] for family, _ in FAMILIES}
