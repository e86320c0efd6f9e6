"""The installed versions; of Triton whichever distribution brings it, and nothing that only has its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tinysr_kernels import versions
from tinysr_kernels.launch import kernel
from tinysr_kernels.runtime import environment


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of packages that hides the installed Triton."""
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    others = [path for path in sys.path if not (Path(path) / "triton").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *others])
    importlib.invalidate_caches()
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    versions.installed.cache_clear()
    kernel.triton_is_installed.cache_clear()


def put_module(site: Path, text: str) -> None:
    (site / "triton").mkdir()
    (site / "triton" / "__init__.py").write_text(text, encoding="utf-8")
    importlib.invalidate_caches()


def put_distribution(site: Path, name: str, number: str) -> None:
    folder = site / f"{name.replace('-', '_')}-{number}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n", encoding="utf-8")


def test_the_versions_of_this_environment() -> None:
    """As the packages state them."""
    torch = importlib.import_module("torch")
    assert versions.installed("torch").partition("+")[0] == torch.__version__.partition("+")[0]  # a build may say less
    assert versions.installed("no-such-package") == versions.NONE
    triton = pytest.importorskip("triton")
    assert versions.triton_version() == versions.installed("triton") == triton.__version__


@pytest.mark.parametrize("name", versions.TRITONS)
def test_triton_by_any_distribution(site: Path, name: str) -> None:
    put_module(site, "# a comment\n__version__ = '3.8.0'\n")
    put_distribution(site, name, "3.8.0.post29")
    assert versions.triton_version() == "3.8.0"
    assert versions.triton_distributions() == {name: "3.8.0.post29"}
    assert kernel.triton_is_installed()
    expected = "3.8.0" if name == "triton" else f"3.8.0 ({name} 3.8.0.post29)"
    assert environment._version("triton") == expected


def test_two_distributions_are_both_named(site: Path) -> None:
    """The later one has overwritten the files of the other: worth knowing."""
    put_module(site, "__version__ = '3.7.1'\n")
    put_distribution(site, "triton", "3.8.0")
    put_distribution(site, "pytorch-triton", "3.7.1")
    assert environment._version("triton") == "3.7.1 (triton 3.8.0, pytorch-triton 3.7.1)"


def test_a_module_that_states_no_version(site: Path) -> None:
    put_module(site, "from triton.version import __version__\n")
    assert versions.triton_version() == "unknown"
    put_distribution(site, "triton-nightly", "3.9.0.dev20261101")
    assert versions.triton_version() == "3.9.0.dev20261101"


def test_what_only_has_the_name(site: Path) -> None:
    """A clone of Triton's repository in the working directory is a namespace package; metadata may be left over."""
    assert versions.triton_version() == versions.NONE
    (site / "triton" / "python").mkdir(parents=True)
    importlib.invalidate_caches()
    put_distribution(site, "triton", "3.7.1")
    assert versions.triton_version() == versions.NONE
    assert not kernel.triton_is_installed()
    assert environment._version("triton").startswith("not installed")
