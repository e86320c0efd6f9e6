"""A driver or a compiler that fails ends in a right picture and a notice that names the remedy (`failures.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.standin import child
from tests.standin.failures import FAILURES, NOT_THE_KERNELS

REMEDIES = {
    "no kernel image": "update PyTorch and the driver",
    "shared memory": "autotune show",
    "no C compiler": "apt-get install gcc",
    "no Python.h": "python3-dev",
    "no folder to write to": "TRITON_CACHE_DIR",
    "unknown GPU": "tinysr doctor",
    "does not compile": "tinysr doctor",
}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return child.run("tests.standin.failures", cache=Path(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("kind", FAILURES)
def test_the_libraries_compute(found: Any, kind: str) -> None:
    assert found[kind]["equal"] == [True, True]
    (notice,) = found[kind]["notices"]
    assert REMEDIES[kind] in notice


@pytest.mark.parametrize("text", NOT_THE_KERNELS)
def test_errors_of_the_device_propagate(found: Any, text: str) -> None:
    assert found[text]


@pytest.mark.parametrize("kind", ["no kernel image", "no C compiler"])
def test_a_whole_picture(found: Any, kind: str) -> None:
    """Of some forty kernels; nothing is said twice."""
    one = found[f"picture: {kind}"]
    assert one["equal"] == [True, True]
    assert one["notices"]
    assert len(set(one["notices"])) == len(one["notices"])
