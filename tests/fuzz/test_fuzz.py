"""The fuzzers, some cases of each. `make fuzz` runs 3,000."""

import json

import pytest

from tests import ROOT
from tests.fuzz.harness import FUZZERS, run

CASES = 25


@pytest.mark.parametrize("name", FUZZERS)
def test_no_faults(name: str) -> None:
    report = run(name, 0, CASES)
    assert not report.faults
    # A fuzzer whose inputs are all accepted, or all refused, looks at one half of the code only.
    assert min(report.outcomes["accepted"], CASES - report.outcomes["accepted"]) >= CASES // 10, report.outcomes


def test_the_page_shows_the_committed_results() -> None:
    results = json.loads((ROOT / "tests/fuzz/results.json").read_text(encoding="utf-8"))
    assert [one["fuzzer"] for one in results] == list(FUZZERS)
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    for one in results:
        assert one["cases"] >= 3000
        assert one["faults"] == {}
        figures = f"{one['seconds']:.0f} | {one['slowest_seconds']:.1f} | {one['peak_bytes'] / 2**20:.0f} |"
        assert f"| `{one['fuzzer']}` | {one['cases']:,} | 0 | {one['outcomes']['accepted']:,} | {figures}" in page


def test_the_harness_sees_faults_hangs_crashes_and_memory() -> None:
    report = run("faulty", 0, 6)
    assert report.outcomes == {"accepted": 2}
    assert set(report.faults) == {1, 2, 3, 4}
    for seed, sign in {1: "ZeroDivisionError", 2: "Timeout", 3: "code -6", 4: "MemoryError"}.items():
        assert sign in report.faults[seed]
