"""Which launch configuration is chosen, and which files count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tinysr_kernels.launch import configs
from tinysr_kernels.launch.device import GPUS, Gpu, assume, gpu_of
from tinysr_kernels.ops import REGISTRY
from tinysr_kernels.ops.sepconv import Config

H200 = GPUS[90]
MEASURED = {"form": "tile", "rows": 1, "pixels": 16, "channels": 32, "outputs": 64, "warps": 2, "stages": 3}
OPERATOR = REGISTRY["sepconv"]
KERNELS = OPERATOR.kernels
ARGUMENTS = OPERATOR.arguments(
    torch.empty(1, 64, 32, 32, dtype=torch.float16, device="meta"),
    torch.empty(64, 3, 3, dtype=torch.float16, device="meta"),
    torch.empty(64, 64, dtype=torch.float16, device="meta"),
)
BUCKET = KERNELS.bucket(**ARGUMENTS)


def content(**changes: object) -> dict:
    return {
        "format": 1,
        "gpu": H200.name,
        "triton": configs._triton(),
        "sources": {"sepconv": configs.source_hash(KERNELS)},
        "entries": {"sepconv": {BUCKET: MEASURED}},
        **changes,
    }


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The user's folder and the bundled one, both empty."""
    user, bundled = tmp_path / "user", tmp_path / "bundled"
    user.mkdir()
    bundled.mkdir()
    monkeypatch.setenv(configs.USER_FOLDER, str(user))
    monkeypatch.setattr(configs, "BUNDLED", bundled)
    configs._read.cache_clear()
    return user, bundled


def write(folder: Path, data: object, gpu: Gpu = H200) -> str:
    path = folder / configs.file_name(gpu.name)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return str(path)


def choose(gpu: Gpu = H200) -> configs.Choice:
    return configs.choose("sepconv", KERNELS, gpu, ARGUMENTS)


def test_order(folders: tuple[Path, Path]) -> None:
    """User's file, bundled file, heuristic; a configuration given by the caller before all."""
    user, bundled = folders
    assert choose() == configs.Choice(KERNELS.heuristic(H200, **ARGUMENTS), "heuristic")
    configs._read.cache_clear()
    path = write(bundled, content())
    assert choose() == configs.Choice(Config(**MEASURED), path)
    configs._read.cache_clear()
    other = {**MEASURED, "warps": 8}
    path = write(user, content(entries={"sepconv": {BUCKET: other}}))
    assert choose() == configs.Choice(Config(**other), path)
    with configs.given(sepconv=Config(**MEASURED)):
        assert choose() == configs.Choice(Config(**MEASURED), "given")
    assert choose().source == path
    assert configs.chosen()[path] >= 1


@pytest.mark.parametrize(
    "changes",
    [
        {"gpu": "NVIDIA H200 NVL"},
        {"format": 2},
        {"triton": "3.0"},
        {"triton": None},
        {"sources": {}},
        {"sources": {"sepconv": "0"}},
        {"entries": {}},
        {"entries": {"sepconv": {BUCKET + " ": MEASURED}}},
        {"entries": {"sepconv": {BUCKET: {**MEASURED, "more": 1}}}},
        {"entries": {"sepconv": {BUCKET: {"form": "tile"}}}},
        {"entries": {"sepconv": {BUCKET: {**MEASURED, "warps": "4"}}}},
        {"entries": {"sepconv": {BUCKET: [1, 2]}}},
    ],
    ids=str,
)
def test_files_that_do_not_count(folders: tuple[Path, Path], changes: dict) -> None:
    write(folders[0], content(**changes))
    assert choose().source == "heuristic"


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_files_that_are_none(folders: tuple[Path, Path], text: str) -> None:
    write(folders[0], text)
    assert choose().source == "heuristic"


def test_another_card_has_another_file(folders: tuple[Path, Path]) -> None:
    write(folders[1], content())
    assert choose(GPUS[80]).source == "heuristic"
    assert len({configs.file_name(gpu.name) for gpu in GPUS.values()}) == len(GPUS)


def test_assumed_gpu() -> None:
    """Tensors on no GPU are planned for the one assumed."""
    x = torch.empty(1)
    with assume(GPUS[120]):
        assert gpu_of(x) == GPUS[120]
        assert gpu_of(x).shared_limit == 99 * 1024
    assert gpu_of(x) == H200
