"""How the tools beside the package are built: layers, sizes of folders, and texts that name only what exists."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests import ROOT

TOOLS = ("model", "benchmarks", "autotune")
FILE_LIMIT = 12
TEST_FILE_LIMIT = 14
"""Folders above the limit, with the number of files that they may have until they are divided."""

# What each room may import of the tools, besides itself. A room stands below those that import it. A file outside the
# folders below, such as benchmarks/__main__.py, is a room of its own.
BELOW: dict[str, set[str]] = {
    "model": set(),
    "model.reference": set(),
    "model.demo": {"model.reference"},
    "model.compress.masks": set(),
    "model.compress.training": {"model.reference", "model.demo"},
    "model.compress.vae": {"model.reference", "model.compress.training"},
    "model.compress": {
        "model.reference",
        "model.demo",
        "model.compress.masks",
        "model.compress.training",
        "model.compress.vae",
    },
    "model.compress.small": {
        "model.reference",
        "model.demo",
        "model.compress.masks",
        "model.compress.training",
        "model.compress.vae",
        "model.compress",
    },
    "model.compress.__main__": {"model.compress.masks", "model.compress", "model.compress.small"},
    "benchmarks": set(),
    "benchmarks.hardware": set(),
    "benchmarks.measure": set(),
    "benchmarks.subjects": {"model.reference", "benchmarks.measure"},
    "benchmarks.static": {"benchmarks.hardware", "benchmarks.subjects"},
    "benchmarks.reports": {"benchmarks.measure"},
    "benchmarks.predict": {"benchmarks.hardware", "benchmarks.subjects", "benchmarks.static", "benchmarks.reports"},
    "benchmarks.commands": {
        "model.reference",
        "model.demo",
        "benchmarks.hardware",
        "benchmarks.measure",
        "benchmarks.subjects",
        "benchmarks.static",
        "benchmarks.reports",
        "benchmarks.predict",
    },
    "benchmarks.test_micro": {"benchmarks.measure", "benchmarks.subjects", "benchmarks.commands"},
    "benchmarks.__main__": {"benchmarks.measure", "benchmarks.static", "benchmarks.reports", "benchmarks.commands"},
    "autotune": set(),
    "autotune.items": {"benchmarks.hardware", "benchmarks.subjects", "benchmarks.static"},
    "autotune.device": {
        "benchmarks.hardware",
        "benchmarks.measure",
        "benchmarks.subjects",
        "benchmarks.static",
        "autotune.items",
    },
    "autotune.search": {"benchmarks.hardware", "benchmarks.predict", "autotune.items"},
    "autotune.commands": {
        "benchmarks.hardware",
        "benchmarks.measure",
        "benchmarks.subjects",
        "benchmarks.static",
        "benchmarks.predict",
        "autotune.items",
        "autotune.device",
        "autotune.search",
    },
    "autotune.__main__": {"autotune.device", "autotune.commands"},
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for tool in TOOLS for path in sorted((ROOT / tool).rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """The modules of the tools that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found & set(MODULES)


def room(module: str) -> str:
    """The longest name in BELOW that holds the module; a module's own name goes before its folder's."""
    parts = module.split(".")
    return next(name for i in range(len(parts), 0, -1) if (name := ".".join(parts[:i])) in BELOW)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downward(module: str) -> None:
    own = room(module)
    for name in imports_of(MODULES[module]):
        assert room(name) in BELOW[own] | {own}, f"{module} imports {name}: {own} may not"


def test_rooms_stand_in_order() -> None:
    """A room names only rooms that come before it in the table, so that rooms form no circle; each has a module."""
    before: set[str] = set()
    for name, below in BELOW.items():
        assert below <= before, f"{name} names {sorted(below - before)}"
        before.add(name)
        assert name in MODULES


def test_no_import_cycles() -> None:
    """No module of the tools reaches itself through imports, those inside functions included."""
    edges = {module: imports_of(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "circle of imports: " + " -> ".join([*path, module])
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def folders(top: str) -> list[Path]:
    return sorted({path.parent for path in (ROOT / top).rglob("*.py")})


@pytest.mark.parametrize("top", ["tinysr_kernels", *TOOLS, "tests"])
def test_a_folder_holds_few_files(top: str) -> None:
    """Twelve Python files besides `__init__`; a folder of tests fourteen, with its helpers."""
    limit = TEST_FILE_LIMIT if top == "tests" else FILE_LIMIT
    for folder in folders(top):
        names = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
        relative = folder.relative_to(ROOT).as_posix()
        assert len(names) <= limit, f"{relative} has {len(names)} files"


DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted(
    path for top in ("tinysr_kernels", *TOOLS, "tests", "docs", ".ci") for path in (ROOT / top).rglob("*.py")
)
MADE_HERE = ("build/", "dist/")
"""Folders that commands write, in no clone."""
TOPS = "tinysr_kernels|model|benchmarks|autotune|tests|docs|examples"
NAMED = re.compile(rf"`([\w.-]+(?:/[\w.-]+)+\.(?:py|md))`|\b((?:{TOPS})/[\w./-]*\.(?:py|md|json))\b")
"""A path in backticks, or one from the top of the checkout anywhere in a text."""
FOLDER = re.compile(rf"`((?:{TOPS})/[\w./-]*/)`|`((?:ops|nets|launch|runtime|checkpoint|files|cli)/[\w./-]*/)`")
"""A folder in backticks, from the top of the checkout or from the package."""
ALONE = re.compile(r"`([\w-]+\.py)`")
"""A file in backticks without its folder."""
ADDED = re.compile(r"^`([\w./-]+\.py)`[^\n]*:\n\n```python$", re.MULTILINE)
"""A file that a page has its reader write: its path, and the code after it."""
PAGES = re.compile(r"\b(DESIGN|INPUTS|PERFORMANCE|STYLE|[A-Z]{3,}\.md)\b|\bFORMATS(?= of| and|:|\.md|,)")
"""Pages named by their title in capitals."""


def texts_of(path: Path) -> str:
    """A document, or the docstrings and comments of a Python file: where prose names files."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    found = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join([*found, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


def missing_files(text: str, folder: Path) -> list[str]:
    """The paths in a text that lead nowhere from the checkout, from the package or from the text's own folder."""
    named = {first or second: None for pattern in (NAMED, FOLDER) for first, second in pattern.findall(text)}
    named = [name for name in named if name not in ADDED.findall(text)]
    bases = (ROOT, ROOT / "tinysr_kernels", folder)
    lost = [name for name in named if not name.startswith(MADE_HERE) and not any((b / name).exists() for b in bases)]
    known = {path.name for path in [*SOURCES, *ROOT.glob("*.py")]}
    return [*lost, *(name for name in ALONE.findall(text) if name not in known)]


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_texts_name_files_that_exist(path: Path) -> None:
    assert missing_files(texts_of(path), path.parent) == []


@pytest.mark.parametrize("path", [*DOCUMENTS, *SOURCES], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_texts_name_pages_that_exist(path: Path) -> None:
    known = {document.name for document in DOCUMENTS}
    assert [found[0] for found in PAGES.finditer(texts_of(path)) if found[0] not in known] == []


def test_missing_files_are_found(tmp_path: Path) -> None:
    """The two searches see what they are for, and let pass what is there."""
    text = "see `ops/nothing.py`, docs/nowhere.md, `launch/hardware.py`, `build/report.md`, `setup.py`, `no_such.py`"
    assert missing_files(text, tmp_path) == ["ops/nothing.py", "docs/nowhere.md", "no_such.py"]
    assert missing_files("`tests/kernels/`, `ops/conv/`, `tests/ops/`", tmp_path) == ["tests/kernels/"]
    written = "see `ops/nothing.py`.\n\n`ops/nothing.py`:\n\n```python\nx = 1\n```\n"
    assert missing_files(written, tmp_path) == []
    assert missing_files(written.replace("python", "text"), tmp_path) == ["ops/nothing.py"]
    assert [found[0] for found in PAGES.finditer("PERFORMANCE says, GPU.md too; a FORMAT, PNG")] == [
        "PERFORMANCE",
        "GPU.md",
    ]
