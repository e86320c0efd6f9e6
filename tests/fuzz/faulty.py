"""A fuzzer whose cases go wrong in every way, for the harness's own test."""

import os
import time
from pathlib import Path

SECONDS = 1.0
MEMORY = 100 << 20


def case(seed: int, folder: Path) -> str:
    """Case 1 raises, 2 hangs, 3 crashes, 4 takes memory; the others are good."""
    (folder / "input").write_bytes(b"")
    if seed == 1:
        raise ZeroDivisionError
    if seed == 2:
        time.sleep(60)
    if seed == 3:
        os.abort()
    if seed == 4:
        bytearray(1 << 30)
    return "accepted"
