"""The numeric tests on the oldest of processors, in part; `make processors` runs more of them on several."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.processors import CHECKOUT, ENVIRONMENTS, environment, numeric_files, run


@pytest.mark.long
def test_numbers_on_the_oldest_processor() -> None:
    """Of one kind of operators: a process of its own, with the variables set, runs them."""
    files = [name for name in numeric_files() if "/linear/" in name]
    done = run("oldest", "-n", "0", "-x", *files)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("name", "capability", "threads"), [("oldest", "DEFAULT", 1), ("SSE4.2 and AVX", "DEFAULT", 2)]
)
def test_the_variables_are_heeded(name: str, capability: str, threads: int) -> None:
    """By PyTorch, and by the tests' own set-up."""
    script = "import tests.conftest, torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment(name), cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [capability, str(threads)]


def test_environments_differ_and_leave_no_core_type_that_would_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len({tuple(sorted(one.items())) for one in ENVIRONMENTS.values()}) == len(ENVIRONMENTS)
    monkeypatch.setattr("tests.processors.NEEDED", {"Haswell": "no such flag"})
    assert environment("AVX2").get("OPENBLAS_CORETYPE") != "Haswell"
    assert environment("oldest")["OPENBLAS_CORETYPE"] == "Prescott"
