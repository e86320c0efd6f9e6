"""sm.cpp, compiled at first use: the cycle model of one SM."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.predict.cubins import FOLDER
from benchmarks.predict.cycles.traffic import Traffic

SOURCE = Path(__file__).with_name("sm.cpp")
FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC")
MACHINE = (
    "alu_cycles", "fma_cycles", "fma_heavy_cycles", "fma_pipes", "xu_cycles", "fp64_cycles", "mma_cycles",
    "wgmma_start", "wgmma_latency", "l2_rate", "dram_rate", "port_rate", "tail_programs", "tail_l2_rate",
    "tail_dram_rate", "l1_latency", "l2_latency", "dram_latency", "shared_latency", "l1_bytes", "fetch_cycles",
    "start_interval",
)  # fmt: skip
"""sm.cpp's `Machine`."""
RESULT = (
    "cycles", "end", "issued", "tensor", "l2_bytes", "dram_read", "dram_written", "l1_hits", "l1_misses", "l1_busy",
    "alu", "fma", "xu", "lsu", "shared", "tags",
)  # fmt: skip
"""sm.cpp's `Result`."""
TENSOR = np.dtype([("dram_share", np.float64), ("same_for_all", np.int32), ("stored_to_dram", np.int32)])
"""sm.cpp's `Tensor`."""


class NoCompiler(Exception):
    """There is no C++ compiler, or it does not compile sm.cpp."""


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ that is there."""
    return shutil.which(os.environ.get("CXX", "")) or next(
        filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled model, kept below build/ by the digest of its source. NoCompiler if it cannot be made."""
    sources = SOURCE.read_bytes() + SOURCE.with_suffix(".h").read_bytes()
    digest = hashlib.sha256(sources + " ".join(FLAGS).encode()).hexdigest()[:16]
    path = FOLDER / f"sm-{digest}.so"
    if not path.exists():
        tool = compiler()
        if tool is None:
            raise NoCompiler("the cycle model needs a C++ compiler: install g++ or clang++, or name one in CXX")
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}.so")
        done = subprocess.run([tool, *FLAGS, "-o", made, SOURCE], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoCompiler(f"{tool} does not compile {SOURCE}: {done.stderr.strip()[:1000]}")
        made.replace(path)
    return ctypes.CDLL(str(path))


def simulate(
    machine: dict[str, float],
    instructions: NDArray[np.void],
    made: Traffic,
    tensors: Sequence[tuple[float, int, int]],
    programs: int,
    resident: int,
) -> dict[str, float]:
    """Run `programs` programs on one SM, `resident` at a time, and return sm.cpp's `Result` by name.

    machine: every entry of MACHINE. instructions: `classes.table`. tensors: (dram_share, same_for_all, stored_to_dram)
    per storage. RuntimeError for programs that wait for each other.
    """
    constants = np.array([machine[name] for name in MACHINE], dtype=np.float64)
    storages = np.array(list(tensors) or [(0.0, 0, 0)], dtype=TENSOR)
    result = np.zeros(len(RESULT))
    arrays = (
        constants,
        np.ascontiguousarray(instructions),
        made.accesses,
        storages,
        made.sectors,
        made.steps,
        made.first,
    )
    at = [array.ctypes.data_as(ctypes.c_void_p) for array in arrays]
    numbers = [ctypes.c_int64(n) for n in (len(instructions), len(made.first) - 1, programs, resident)]
    failed = library().simulate(at[0], at[1], numbers[0], *at[2:], *numbers[1:], result.ctypes.data_as(ctypes.c_void_p))
    if failed:
        raise RuntimeError("the programs wait for each other, or never end")
    return dict(zip(RESULT, result.tolist(), strict=True))
