"""`make audit`: pip-audit over every pin of constraints.txt and every floor of pyproject.toml. Needs the network.

`advisories.json` is what was known when it was written: `make test` holds floors and pins to it offline. This asks what
is known today, and fails for an advisory that is to be added there.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOOR = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[\w,]+\])?\s*>=\s*([0-9.]+)")
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==(\S+)$", re.MULTILINE)


def requirements() -> list[str]:
    """Every requirement in pyproject.toml: of the package, its extras and its build."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = content["project"]
    extras = [one for some in project["optional-dependencies"].values() for one in some]
    return [*project["dependencies"], *extras, *content["build-system"]["requires"]]


def floors() -> set[tuple[str, str]]:
    """(package, lowest version) of every requirement that has one."""
    return {found.groups() for one in requirements() if (found := FLOOR.match(one))}  # type: ignore[misc]


def pins() -> set[tuple[str, str]]:
    """(package, version) of every line of constraints.txt."""
    return set(PIN.findall((ROOT / "constraints.txt").read_text(encoding="utf-8")))


def advisories() -> list[dict]:
    """package, id, fixed (the first version without it, or null), summary, url; and for those that cannot reach this
    project whatever the version: `unused`, what they need and the package does not name, and the reason."""
    return json.loads((ROOT / ".ci" / "advisories.json").read_text(encoding="utf-8"))


def main(folder: Path = ROOT / "build") -> int:
    """Run pip-audit for the pins, then for the floors; the exit code is 1 if either has a new advisory."""
    ignored = [word for one in advisories() if "unused" in one for word in ("--ignore-vuln", one["id"])]
    codes = []
    for name, versions in (("pins", pins()), ("floors", floors())):
        file = folder / f"{name}.txt"
        file.write_text("".join(f"{package}=={version}\n" for package, version in sorted(versions)), encoding="utf-8")
        print(f"{name}:", flush=True)
        command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "-s", "osv", "-r", str(file)]
        codes.append(subprocess.run([*command, *ignored], check=False).returncode)
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
