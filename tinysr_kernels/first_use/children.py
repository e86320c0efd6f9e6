"""How this process starts a Python of its own kind: for the self-check, and to compile kernels ahead."""

from __future__ import annotations

import os
import re
import sys

PYTHON = re.compile(r"python[\w.]*(\.exe)?", re.IGNORECASE)


def obstacle() -> str:
    """Why no child can be started, or nothing: `sys.executable` is another program where Python is embedded."""
    name = os.path.basename(sys.executable or "")
    if getattr(sys, "frozen", False) or PYTHON.fullmatch(name) is None:
        return f"Python is embedded in {name or 'another program'}"
    return ""


def command(module: str) -> list[str]:
    """What runs a module in a child that finds the same packages as this process, also where PYTHONPATH is ignored."""
    code = f"import sys; sys.path[:] = {sys.path!r}; import runpy; runpy.run_module({module!r}, run_name='__main__')"
    return [sys.executable, "-c", code]
