"""Floors and pins have the fixes of all known advisories; what is imported is declared, what is declared imported."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import ROOT
from tests.test_hosting import load
from tinysr_kernels.errors import InputError

_spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
assert _spec is not None
assert _spec.loader is not None
audit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(audit)

FLOORS, PINS, ADVISORIES = audit.floors(), audit.pins(), audit.advisories()
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "nvidia-ml-py": "pynvml",
    "triton-windows": "triton",
}
"""Where the module is not named as the package."""
TOOLS = {"build", "ruff", "mypy", "pre-commit", "setuptools", "sphinx", "furo", "myst-parser"}
PLUGINS = {"pytest-xdist", "pytest-benchmark"}
OFFERED = {"accelerate", "lpips", "pyiqa"}
"""What compression uses where a user has installed it (docs/compression.md)."""
OURS = {"tinysr_kernels", "model", "tests", "benchmarks", "autotune", "site_text"}


def version(text: str) -> tuple[int, ...]:
    """2.13.0 -> (2, 13, 0), 3.7.1.post27 -> (3, 7, 1); 13 and 13.0.0 are equal."""
    numbers = [int(n) for n in text.partition(".post")[0].split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def test_versions_compare_as_numbers() -> None:
    assert version("13") == version("13.0.0") > version("12.10.1") > version("12.9")


def test_the_list_of_advisories_is_well_formed() -> None:
    assert len(ADVISORIES) > 40
    assert len({(one["package"], one["id"]) for one in ADVISORIES}) == len(ADVISORIES)
    known = {package for package, _ in FLOORS | PINS}
    for one in ADVISORIES:
        assert (
            {"package", "id", "fixed", "summary", "url"}
            <= set(one)
            <= {*("package", "id", "fixed", "summary", "url", "unused", "reason")}
        )
        assert one["package"] in known, f"{one['package']} is no requirement"
        assert re.fullmatch(r"(CVE-\d{4}-\d+|GHSA(-\w{4}){3}|PYSEC-\d{4}-\d+)", one["id"]), one["id"]
        assert one["url"].startswith("https://")
        assert one["fixed"] is not None or "unused" in one, (
            f"{one['id']} has no fix and no reason why it does not matter"
        )
        assert ("unused" in one) == ("reason" in one)


def unfixed(versions: set[tuple[str, str]]) -> list[str]:
    """The versions with an advisory that can reach the package."""
    return [
        f"{package} {text}: {one['id']} is fixed in {one['fixed']}"
        for package, text in sorted(versions)
        for one in ADVISORIES
        if one["package"] == package and "unused" not in one and version(text) < version(one["fixed"])
    ]


def test_every_floor_and_every_pin_has_the_fixes() -> None:
    assert unfixed(FLOORS) == []
    assert unfixed(PINS) == []
    assert len(unfixed({("pillow", "12.3.0"), ("tqdm", "4.66.2")})) > 5  # the check sees something


def test_no_pin_is_below_its_floor() -> None:
    pins = dict(PINS)
    assert [(p, f, pins[p]) for p, f in FLOORS if p in pins and version(pins[p]) < version(f)] == []


@pytest.mark.parametrize("one", [a for a in ADVISORIES if "unused" in a], ids=lambda one: one["id"])
def test_what_an_unmended_advisory_needs_is_not_used(one: dict[str, Any]) -> None:
    files = (ROOT / "tinysr_kernels").rglob("*.py")
    assert [path.name for path in files if one["unused"] in path.read_text(encoding="utf-8")] == []


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """The top names of everything that a file imports, in functions too, and of what tests import if it is there."""
    return frozenset(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.importorskip":
            yield str(ast.literal_eval(node.args[0])).split(".")[0]


def imports_of(*folders: str) -> set[str]:
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return {name for path in files for name in imported(path)} - set(sys.stdlib_module_names) - OURS


def module_of(package: str) -> str:
    return MODULES.get(package, package.replace("-", "_"))


def test_every_import_is_declared() -> None:
    """Of the package: by its dependencies or by an extra that is not for developers. Of the rest: by any."""
    content = audit.tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = content["optional-dependencies"]
    for_users = [
        *content["dependencies"],
        *(one for name in ("video", "heif", "prompt", "gpu") for one in extras[name]),
    ]
    declared = {module_of(re.split(r"[><=\[; ]", one)[0]) for one in for_users}
    assert imports_of("tinysr_kernels") <= declared
    everything = {module_of(package) for package, _ in FLOORS | PINS}
    others = imports_of("model", "benchmarks", "autotune", "tests", "examples") - everything
    assert others <= OFFERED, "neither declared nor used only where a user has installed it"


def test_every_declared_package_is_imported() -> None:
    names = imports_of("tinysr_kernels", "model", "benchmarks", "autotune", "tests", "examples", "docs")
    packages = {package for package, _ in FLOORS} - TOOLS - PLUGINS
    assert sorted(package for package in packages if module_of(package) not in names) == []


@pytest.mark.parametrize("package", sorted({p for p, _ in FLOORS} - TOOLS - {"triton", "triton-windows"}))
def test_what_runs_here_is_at_or_above_the_floor(package: str) -> None:
    try:
        found = distribution(package).version
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    number = re.match(r"[\d.]+", found)
    assert number is not None
    assert all(version(number[0].rstrip(".")) >= version(floor) for name, floor in FLOORS if name == package)


def hide(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these modules were not installed."""
    for name in [one for one in sys.modules if one.split(".")[0] in modules]:
        monkeypatch.delitem(sys.modules, name)
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)


def test_without_the_extra_for_video(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinysr_kernels.files.video.opening import pyav

    hide(monkeypatch, "av")
    with pytest.raises(InputError, match=r"pip install .tinysr-kernels\[video\]"):
        pyav()


def test_without_the_extra_for_heif(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tinysr_kernels.files.reading import heif

    hide(monkeypatch, "pillow_heif")
    path = tmp_path / "a.heic"
    path.write_bytes(b"")
    with open(path, "rb") as stream, pytest.raises(InputError, match=r"pip install .tinysr-kernels\[heif\]"):
        heif.read_heif(path, stream, None, lambda *size: None)


def test_without_the_extra_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from tinysr_kernels.first_use import machine
    from tinysr_kernels.launch import backend

    hide(monkeypatch, "pynvml")
    assert machine._version_of_nvml() == ""
    monkeypatch.setattr(backend, "triton_is_installed", lambda: False)
    with pytest.raises(InputError, match=r"Triton is not installed; use backend='auto'"):
        backend.choose_backend("triton", torch.device("cpu"))


def test_without_the_extra_for_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A report without its plots."""
    from benchmarks.reports.plots import _figure

    hide(monkeypatch, "matplotlib")
    with pytest.raises(ImportError):
        _figure(1, 1)


def test_the_hosted_workflow_asks_today() -> None:
    """Every week, and at every change; not in .ci/run, which must pass without a network."""
    workflow = load(ROOT / ".github" / "workflows" / "audit.yml")
    assert set(workflow["on"]) == {"push", "pull_request", "schedule"}
    assert workflow["permissions"] == {"contents": "read"}
    *_, run = workflow["jobs"]["advisories"]["steps"]
    assert run == {"run": "make audit"}
    assert "audit" not in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^audit: .*\n\t.*\.ci/audit\.py$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_audit_asks_about_floors_and_pins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip-audit is called for both, with the advisories that cannot reach the package ignored."""
    commands = []

    class Done:
        returncode = 0

    def record(command: list[str], check: bool) -> Done:
        commands.append(command)
        return Done()

    monkeypatch.setattr(audit.subprocess, "run", record)
    assert audit.main(tmp_path) == 0
    assert [Path(command[command.index("-r") + 1]).name for command in commands] == ["pins.txt", "floors.txt"]
    assert all("CVE-2026-136426" in command for command in commands)
    Done.returncode = 1
    assert audit.main(tmp_path) == 1
