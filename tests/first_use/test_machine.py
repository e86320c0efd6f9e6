"""What kernels need of a machine, found or missing."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import pytest

from tinysr_kernels.first_use import machine
from tinysr_kernels.versions import installed


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_the_compiler_is_the_one_that_triton_would_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert machine.c_compiler() == ""
    clang = program(tmp_path / "clang")
    assert machine.c_compiler() == str(clang)
    gcc = program(tmp_path / "gcc")
    assert machine.c_compiler() == str(gcc)
    monkeypatch.setenv("CC", "missing-cc")
    assert machine.c_compiler() == ""
    monkeypatch.setenv("CC", str(program(tmp_path / "own" / "cc")))
    assert machine.c_compiler() == str(tmp_path / "own" / "cc")


def test_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert machine.python_headers() == ""
    (tmp_path / "Python.h").write_text("")
    assert machine.python_headers() == str(tmp_path)


def test_tritons_cache_is_where_triton_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert machine.triton_cache() == Path(os.path.expanduser("~/.triton/cache"))
    monkeypatch.setenv("TRITON_HOME", str(tmp_path))
    assert machine.triton_cache() == tmp_path / ".triton" / "cache"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "other"))
    assert machine.triton_cache() == tmp_path / "other"


def test_folders_that_can_be_written_or_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is made by asking."""
    assert machine.obstacle_to_writing(tmp_path / "a" / "b") == ""
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert "no folder" in machine.obstacle_to_writing(tmp_path / "file" / "below")
    monkeypatch.setattr(machine, "has_room", lambda folder, size: False)
    assert machine.obstacle_to_writing(tmp_path, 64 << 20) == "less than 64 MiB are free"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert machine.obstacle_to_writing(tmp_path) == "not writable"


def test_ptxas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    assert (machine.ptxas() != "") == (installed("triton") != "none")
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "missing"))
    assert machine.ptxas() == ""
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(program(tmp_path / "ptxas")))
    assert machine.ptxas() == str(tmp_path / "ptxas")


@pytest.mark.parametrize(
    ("lines", "version"),
    [
        (["filelock", "triton==3.6.0; platform_system == 'Linux'"], "3.6.0"),
        (["pytorch-triton==3.7.0"], "3.7.0"),
        (["triton-kernels==1.0", "sympy>=1.13"], ""),
        (None, ""),
    ],
)
def test_the_triton_of_this_torch(lines: list[str] | None, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda package: lines)
    assert machine.triton_of_torch() == version


def test_the_driver_is_known_or_not() -> None:
    machine.driver_version.cache_clear()
    assert machine.driver_version()
