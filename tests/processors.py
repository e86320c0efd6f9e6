"""Other processors than this one, as far as environment variables make them.

    python -m tests.processors [PATH...]

PyTorch, oneDNN, MKL, OpenBLAS and NumPy choose their code by the instruction sets that they find, and may be told to do
with fewer. Each environment runs the tests marked `numeric`, in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "oldest": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_CBWR": "COMPATIBLE",
        "OPENBLAS_CORETYPE": "Prescott",
        "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4",
    },
    "SSE4.2 and AVX": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "AVX",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "TEST_THREADS": "2",
    },
    "AVX2": {**AVX2, "MKL_CBWR": "AVX2", "NPY_DISABLE_CPU_FEATURES": "X86_V4"},
    "AVX2, two threads": {**AVX2, "MKL_ENABLE_INSTRUCTIONS": "AVX2", "TEST_THREADS": "2"},
    "AVX-512 without bfloat16": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_CBWR": "AVX512",
        "OPENBLAS_CORETYPE": "SkylakeX",
    },
    "this one, two threads": {"TEST_THREADS": "2"},
}
"""Name -> variables. TEST_THREADS: threads of PyTorch, of MKL and of OpenBLAS (tests/conftest.py), one if not given.

What a variable allows beyond the processor's own instructions changes nothing, but OPENBLAS_CORETYPE (`environment`).
"""
NEEDED = {"Haswell": "avx2", "SkylakeX": "avx512f"}
"""The flag of /proc/cpuinfo without which a core type of OpenBLAS ends in an illegal instruction."""
KERNELS = ("attention/test_attention", "norm/test_group_norm", "linear/test_linear", "conv/test_sepconv")


def numeric_files() -> list[str]:
    """The test files of operators and networks, without those that run kernels in the interpreter."""
    found = (path for folder in ("ops", "nets") for path in (CHECKOUT / "tests" / folder).rglob("test_*.py"))
    return sorted(str(path.relative_to(CHECKOUT)) for path in found if "_kernel" not in path.stem)


SINGLE = "not float16 and not float64"
"""pytest's -k for float32 alone, where processors differ; 16-bit results differ by the rounding to 16 bits at most."""


def environment(name: str) -> dict[str, str]:
    """The process's own variables with those of ENVIRONMENTS[name], without a core type that this processor lacks."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    chosen = dict(ENVIRONMENTS[name])
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf-8").split() if info.exists() else []
    if NEEDED.get(chosen.get("OPENBLAS_CORETYPE", ""), "") not in ("", *flags):
        del chosen["OPENBLAS_CORETYPE"]
    threads = chosen.setdefault("TEST_THREADS", "1")
    # Threads that wait give their core to those that work: there may be fewer cores than threads.
    openmp = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
    return {**outer, **chosen, **openmp, "PYTHONPATH": str(CHECKOUT)}


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest on the numeric tests in float32, by these arguments, under an environment; its output is kept."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "numeric", "-k", SINGLE]
    return subprocess.run(
        [*command, *arguments], env=environment(name), cwd=CHECKOUT, capture_output=True, text=True, check=False
    )


def main(paths: list[str]) -> int:
    """Run all environments and print one line per environment, and what failed; 1 if anything did.

    paths: test files; unless given, operators, networks, and some of the kernels, whose interpreter is slow.
    """
    failed = False
    for name in ENVIRONMENTS:
        started = time.monotonic()
        workers = "1" if "TEST_THREADS" in ENVIRONMENTS[name] else "2"
        chosen = paths or [*numeric_files(), *(f"tests/ops/{kernel}_kernel.py" for kernel in KERNELS)]
        done = run(name, "-n", workers, "--dist", "loadfile", *chosen)
        last = done.stdout.strip().rpartition("\n")[2]
        sys.stdout.write(f"{name}: {last}, {time.monotonic() - started:.0f} s in all\n")
        if done.returncode:
            failed = True
            sys.stdout.write(f"{done.stdout}{done.stderr}\n")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
