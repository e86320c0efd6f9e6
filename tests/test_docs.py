"""The documentation: the tutorial's commands run, every page has a place, and the Python page names what is public."""

import inspect
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import tinysr_kernels

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS / "site"))

from site_text import as_rst, with_parameters, with_toctrees, wrapped  # noqa: E402  # after the path above

# Pages that may be written before the index lists them.
NOT_RUN = re.compile(r"<!-- not run: [^\n]+ -->\n$")


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, code) of every fenced block in order, without those that `<!-- not run: why -->` stands before."""
    fences = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(match[1], match[2]) for match in fences if not NOT_RUN.search(text[: match.start()])]


def command(path: Path, line: str) -> None:
    """A program of the name that runs `line` with the tests' interpreter."""
    path.write_text(f"#!/bin/sh\nexec {sys.executable} {line}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.long
def test_tutorial_runs(tmp_path: Path) -> None:
    """Every block, in order, in a folder that holds what the tutorial uses of a checkout."""
    programs = tmp_path / "bin"
    programs.mkdir()
    command(programs / "python", '"$@"')
    entry = "import sys; from tinysr_kernels.cli.main import main; sys.exit(main())"
    command(programs / "tinysr", f"-c '{entry}' \"$@\"")
    work = tmp_path / "checkout"
    work.mkdir()
    for name in ("docs", "examples"):
        (work / name).symlink_to(ROOT / name)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runners = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    todo = blocks((DOCS / "tutorial.md").read_text(encoding="utf-8"))
    assert {language for language, _ in todo} == set(runners)
    for language, code in todo:
        done = subprocess.run(
            [*runners[language], code], cwd=work, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
    sizes = {
        "cat.png": (448, 300),
        "coffee.png": (600, 400),
        "rocket.png": (640, 424),
        "enlarged/chelsea.jpg": (448, 300),
    }
    for name, size in sizes.items():
        with Image.open(work / name) as image:
            assert image.size == size, name
    report = (work / "report.jsonl").read_text(encoding="utf-8").splitlines()
    assert sum('"input"' in line for line in report) == len(list((DOCS / "photos").glob("*.jpg")))
    assert all((work / name).stat().st_size for name in ("clip-x4.mp4", "own/fast.safetensors"))


def test_only_the_set_up_is_excepted_from_the_tutorial() -> None:
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    fences = len(re.findall(r"^```\w", text, re.MULTILINE))
    assert fences - len(blocks(text)) == text.count("<!-- not run: ") == 1


def test_index_lists_every_page_once() -> None:
    """The site's navigation is made of these lists (docs/site/site_text.py)."""
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = [(DOCS / target).resolve() for target in re.findall(r"^- \[[^\]]+\]\(([^)]+)\)", text, re.MULTILINE)]
    pages = [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").glob("*.md")]
    expected = set(pages) - {DOCS / "index.md"}
    assert len(listed) == len(set(listed))
    assert set(listed) == expected


def test_python_page_names_all_that_is_public() -> None:
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r":: tinysr_kernels\.(\w+)", text))
    assert documented == set(tinysr_kernels.__all__) - {"__version__", "ops"}
    members = re.search(r":members: (.*)", text)
    assert members is not None
    methods = {name for name, _ in inspect.getmembers(tinysr_kernels.CompiledSR, inspect.isfunction) if name[0] != "_"}
    assert set(members[1].split(", ")) == methods


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_pages_have_one_title(name: str) -> None:
    """One heading of the first level, at the top: it names the page in the navigation and in search results."""
    text = re.sub(r"^```.*?^```", "", (DOCS / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^# .*$", text, re.MULTILINE) == [text.splitlines()[0]]


def test_toctrees_follow_the_lists() -> None:
    text = "# Title\n\n## Use\n\n- [One](one.md): first\n- [Two](../two.md): second\n\n## More\n\nno list\n"
    first, second = re.findall(r"```{toctree}\n(.*?)```", with_toctrees(text), re.DOTALL)
    assert first == ":hidden:\n:caption: Use\n\nOne <one>\nTwo <../two>\n"
    assert second == ":hidden:\n:caption: More\n\n"


def test_docstrings_become_restructuredtext() -> None:
    assert as_rst(["`a_b` of x*y|z_ is", "", "    plain"]) == ["``a_b`` of x\\*y\\|z\\_ is", "", "    plain"]
    assert as_rst(["an example:", "", "    code"]) == ["an example::", "", "    code"]
    assert as_rst(["a colon:", "no example"]) == ["a colon:", "no example"]


def test_arguments_become_fields() -> None:
    lines = ["What it does.", "", "Said first. dtype: of the", "weights; kept. device: where. Raises InputError.", ""]
    fields = ":param dtype: of the weights; kept.\n:param device: where."
    expected = f"What it does.\n\nSaid first.\n\n{fields}\n\nRaises InputError."
    assert "\n".join(with_parameters(lines, ("dtype", "device"))).rstrip() == expected
    assert with_parameters(lines, ()) == lines


def test_schemas_have_an_argument_per_line() -> None:
    schema = 'tinysr::f(Tensor x, int[2] stride=[1, 1], str act="none") -> (Tensor, Tensor)'
    assert wrapped(schema) == (
        'tinysr::f(\n    Tensor x,\n    int[2] stride=[1, 1],\n    str act="none",\n) -> (Tensor, Tensor)'
    )
