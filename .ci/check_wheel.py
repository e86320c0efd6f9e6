"""Check the contents of a built wheel: one package with its data and command, and no other files.

python .ci/check_wheel.py dist/tinysr_kernels-0.1.0-py3-none-any.whl
"""

import sys
import zipfile
from email.parser import Parser
from pathlib import Path

PACKAGE = "tinysr_kernels"
CHECKPOINT_LIMIT = 3 * 1000 * 1000
WHEEL_LIMIT = 5 * 1000 * 1000


def problems(path: Path) -> list[str]:
    """Descriptions of all problems of the wheel; empty if it is correct."""
    with zipfile.ZipFile(path) as wheel:
        sizes = {entry.filename: entry.file_size for entry in wheel.infolist() if not entry.is_dir()}
        info = next(name.split("/")[0] for name in sizes if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
        commands = wheel.read(f"{info}/entry_points.txt").decode()
    strays = sorted(name for name in sizes if name.split("/")[0] not in (PACKAGE, info))
    found = [f"{name} is outside the package" for name in strays]
    sources = {str(file) for file in Path(PACKAGE).rglob("*.py")}
    found += [f"{name} is missing" for name in sorted(sources - sizes.keys())]
    if f"{PACKAGE}/py.typed" not in sizes:
        found.append("py.typed is missing: users would not get the types")
    if not any(name.startswith(f"{info}/") and name.endswith("LICENSE") for name in sizes):
        found.append("LICENSE is missing")
    checkpoints = {name: size for name, size in sizes.items() if name.endswith(".safetensors")}
    if not checkpoints:
        found.append('no checkpoint: compile("demo") would fail')
    for name, size in checkpoints.items():
        if size > CHECKPOINT_LIMIT:
            found.append(f"{name} has {size} bytes, more than {CHECKPOINT_LIMIT}")
    if path.stat().st_size > WHEEL_LIMIT:
        found.append(f"the wheel has {path.stat().st_size} bytes, more than {WHEEL_LIMIT}")
    if "tinysr = tinysr_kernels.cli.main:main" not in commands:
        found.append("the command tinysr is not registered")
    if metadata["License-Expression"] != "Apache-2.0":
        found.append(f"license is {metadata['License-Expression']!r}, expected 'Apache-2.0'")
    return found


def main(path: Path) -> int:
    """Print the problems; the exit code is 1 if there are any."""
    found = problems(path)
    for line in found:
        print(f"{path.name}: {line}", file=sys.stderr)
    if not found:
        print(f"{path.name}: {path.stat().st_size} bytes, contents correct")
    return bool(found)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
