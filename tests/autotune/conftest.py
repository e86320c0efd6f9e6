"""Fixtures of the tuner's tests: the simulated operator is registered, and no user's files are read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from autotune.commands import check
from autotune.device import gpu
from tests.autotune.simulated import OP, Simulated
from tinysr_kernels.launch import configs
from tinysr_kernels.ops import REGISTRY


@pytest.fixture(autouse=True)
def _simulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setitem(REGISTRY, OP, Simulated)
    monkeypatch.setenv(configs.USER_FOLDER, str(tmp_path / "user"))
    monkeypatch.setattr(configs, "BUNDLED", tmp_path / "bundled")
    for module in (check, gpu):
        monkeypatch.setattr(module, "CACHE", tmp_path / "compiled.jsonl")
    configs.forget()
    yield
    configs.forget()


@pytest.fixture
def file() -> Path:
    """The user's configuration file for the simulated device."""
    return configs.user_file("NVIDIA H200")
