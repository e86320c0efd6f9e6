"""Run the families on the stand-in: `python -m tests.standin`; exit code 1 if a GPU would have met a fault."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile


def main() -> int:
    """Print a line for each family, or with --json what was seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.standin", description=__doc__)
    parser.add_argument("--triton", help="a folder with another Triton than the installed one")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--sizes", choices=("few", "all"), default="all")
    parser.add_argument("--stop", choices=("signature", "ttir", "cubin"), default="ttir")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "0"
    if options.triton:
        sys.path.insert(0, os.path.abspath(options.triton))
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    import triton

    from tests.standin.sizes import FAMILIES, ORDINARY, SMALL, run, too_many

    sizes = SMALL + ORDINARY if options.sizes == "all" else SMALL[::2]
    seen = {family: run(family, name, sizes, options.stop, options.arch) for family, name in FAMILIES}
    lines = []
    for family, one in seen.items():
        if options.sizes == "all":
            one.faults += too_many(family, one)
        lines.append(f"{family}: {one.images} sizes, {one.launches} launches, {one.compiled} kernels")
        lines += [f"    {fault}" for fault in one.faults]
    faults = sum(len(one.faults) for one in seen.values())
    lines.append(f"Triton {triton.__version__}, sm_{options.arch}: {faults or 'no'} faults")
    if options.json:
        lines = [json.dumps({family: dataclasses.asdict(one) for family, one in seen.items()})]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
