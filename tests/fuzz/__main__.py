"""`python -m tests.fuzz [FUZZER ...]`: run fuzzers at length and write their reports as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tests.fuzz.harness import FUZZERS, run


def main() -> int:
    """Print a line for each fuzzer and every fault; the exit code is 1 if there was one."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("fuzzers", nargs="*", metavar="FUZZER", help=f"of {' '.join(FUZZERS)} (default: all)")
    parser.add_argument("--cases", type=int, default=3000, help="for each fuzzer (default: 3000)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case (default: 0)")
    parser.add_argument("--out", type=Path, help="write the reports to this file")
    arguments = parser.parse_args()
    unknown = set(arguments.fuzzers) - set(FUZZERS)
    if unknown:
        parser.error(f"no such fuzzer: {' '.join(sorted(unknown))}")
    reports = []
    for name in arguments.fuzzers or FUZZERS:
        report = run(name, arguments.first, arguments.first + arguments.cases)
        reports.append(report.as_dict())
        for seed, fault in report.faults.items():
            print(f"{name} {seed}:\n{fault}\n")
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in report.outcomes.most_common())
        print(
            f"{name}: {report.cases} cases in {report.seconds:.0f} s, {len(report.faults)} faults ({outcomes}), "
            f"slowest {report.slowest_seconds:.1f} s (seed {report.slowest_seed}), "
            f"memory +{report.peak_bytes / 2**20:.0f} MB"
        )
        if arguments.out:
            arguments.out.write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")
    return 1 if any(report["faults"] for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
