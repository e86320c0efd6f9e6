"""The package imports, and its files are handled, where POSIX is missing and open files cannot be replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="open files are read from /proc")


def test_without_posix(tmp_path: Path) -> None:
    """In a process of its own, because `foreign.py` takes parts of the standard library away."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.platforms.foreign", str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
