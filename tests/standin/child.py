"""Other processes, in which kernels are compiled: under pytest they are interpreted, and Triton's functions too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests import ROOT


def run(module: str, *arguments: str, cache: Path | None = None, **variables: str) -> Any:
    """What `python -m module` printed, from JSON. cache: Triton's; variables: of the environment."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), **variables}
    environment.pop("TINYSR_LAUNCH_GUARD", None)
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
