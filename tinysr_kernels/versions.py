"""Versions of the installed packages, found without importing them."""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TRITONS = (
    "triton",
    "triton-windows",
    "triton-nightly",
    "triton-xpu",
    "pytorch-triton",
    "pytorch-triton-rocm",
    "pytorch-triton-xpu",
)
"""The distributions that bring the module `triton`."""
NONE = "none"
_VERSION = re.compile(r"""^__version__\s*=\s*["']([0-9][^"']*)["']""", re.MULTILINE)


@functools.cache
def installed(package: str) -> str:
    """The version of an installed package, or "none". Of Triton: whichever distribution brings it."""
    return triton_version() if package == "triton" else _distribution(package)


def _distribution(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return NONE


def triton_distributions() -> dict[str, str]:
    """Name and version of every installed distribution that brings the module `triton`; more than one is a fault."""
    found = {name: _distribution(name) for name in TRITONS}
    return {name: number for name, number in found.items() if number != NONE}


def triton_version() -> str:
    """The version of the Triton that would be imported: what its module states, else its distribution; or "none".

    A folder of that name without an `__init__.py`, such as a clone of Triton's repository, is no Triton.
    """
    try:
        found = importlib.util.find_spec("triton")
    except (ImportError, ValueError):  # ValueError: a module without a specification took its place
        return NONE
    if found is None or found.origin is None:
        return NONE
    try:
        stated = _VERSION.search(Path(found.origin).read_text(encoding="utf-8", errors="replace"))
    except OSError:  # in a zip file, or frozen
        stated = None
    return stated[1] if stated else next(iter(triton_distributions().values()), "unknown")
