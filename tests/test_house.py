"""How the house is built: layers, light imports, sizes of files, and documents that agree with the code."""

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import ROOT
from tinysr_kernels.families import FAMILIES, UNetConfig, config_to_dict

PACKAGE = "tinysr_kernels"
LINE_LIMIT = 400

# What each layer may import of the package, besides itself and the leaves: imports run downward only.
LEAVES = {"atomic", "errors", "_version", "versions"}
BELOW = {
    "cli": {"files", "runtime", "first_use", "launch", ""},
    "integrations": {"files", "runtime", ""},
    "": {"runtime", "ops"},
    "files": {"runtime"},
    "runtime": {"families", "nets", "first_use", "ops", "launch", "checkpoint"},
    "families": {"nets", "checkpoint"},
    "nets": {"ops", "launch"},
    "first_use": {"ops", "launch"},
    "ops": {"launch"},
    "launch": set(),
    "checkpoint": set(),
    "atomic": set(),
    "errors": set(),
    "_version": set(),
    "versions": set(),
}
HEAVY = ("torch", "triton", "PIL", "numpy", "tifffile", "imagecodecs", "av", "safetensors", "tqdm")


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in python_files(PACKAGE)}


def imports_of(path: Path, *, at_import_time: bool = False) -> set[str]:
    """Dotted names a file imports; `from a import b` gives a.b where that is a module of the package, else a.

    With at_import_time, only what running the file's top level imports: nothing inside functions or
    `if TYPE_CHECKING`.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in top_level(tree) if at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else str(node.module))
    return found


def top_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run when the module is imported, those under if, try and with included."""
    waiting: list[ast.stmt] = list(tree.body)
    found = []
    while waiting:
        node = waiting.pop()
        found.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            waiting += [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
    return found


def layer(module: str) -> str:
    """tinysr_kernels.nets.fold -> nets; tinysr_kernels -> the face, ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downward(module: str) -> None:
    own = layer(module)
    assert own in BELOW, f"{module} belongs to no known layer"
    allowed = BELOW[own] | LEAVES | {own} if own not in LEAVES else LEAVES
    for name in imports_of(MODULES[module]):
        head = name.split(".")[0]
        assert head not in ("model", "tests", "benchmarks", "autotune"), f"{module} imports {name}"
        if head == PACKAGE:
            assert layer(name) in allowed, f"{module} imports {name}: {own or 'the face'} may not"


def test_no_import_cycles() -> None:
    """No module of the package reaches itself through imports, those inside functions included."""
    edges = {m: {n for n in imports_of(path) if n in MODULES and n != PACKAGE} for m, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "circle of imports: " + " -> ".join([*path, module])
        if module not in done:
            for target in sorted(edges[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


CONFIGURATIONS = {"ColorFix"} | {family.config_class.__name__ for family in FAMILIES.values()}
"""All that the reference networks share with the package."""


def names_from(path: Path, module: str) -> set[str]:
    """What a file imports from a module by name."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == module)
    return {alias.name for node in found for alias in node.names}


def test_reference_networks_know_only_the_configurations() -> None:
    """model/ is the oracle: it may share the configurations; training code may use the face as users do.

    The networks themselves, the files directly under model/, know neither the demo's training nor the recipe, and the
    demo does not know the recipe.
    """
    above = {"demo": ["model.compress"], "compress": [], "model": ["model.demo", "model.compress"]}
    for path in python_files("model"):
        parts = path.relative_to(ROOT).parts
        part = parts[1] if parts[1] in above else "model"
        allowed = {f"{PACKAGE}.families"} | ({PACKAGE} if part != "model" else set())
        names = imports_of(path)
        used = {name for name in names if name.split(".")[0] == PACKAGE}
        assert used <= allowed, f"{path.relative_to(ROOT)} imports {sorted(used - allowed)}"
        for name in names:
            assert not any(f"{name}.".startswith(f"{head}.") for head in above[part]), f"{path} imports {name}"
        if part == "model":
            taken = names_from(path, f"{PACKAGE}.families")
            assert taken <= CONFIGURATIONS, f"{path} imports {sorted(taken - CONFIGURATIONS)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_loads_triton_with_itself(module: str) -> None:
    """Triton is imported where it is used, so that every module works where it is not installed."""
    heads = {name.split(".")[0] for name in imports_of(MODULES[module], at_import_time=True)}
    assert "triton" not in heads


def run_python(code: str, *arguments: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_is_light() -> None:
    """No torch, Triton or image library, hence no GPU; the names are there all the same."""
    loaded = run_python(
        """
        import sys
        before = set(sys.modules)
        import tinysr_kernels
        assert {"compile", "ops", "CheckpointError", "InputError"} <= set(dir(tinysr_kernels))
        assert issubclass(tinysr_kernels.OutOfMemory, tinysr_kernels.TinySRError)
        print(*sorted(set(sys.argv[1:]) & (set(sys.modules) - before)))
        """,
        *HEAVY,
    )
    assert loaded == ""


def test_the_command_answers_help_without_torch() -> None:
    """`tinysr --help` must not take the seconds that loading torch takes."""
    out = run_python(
        """
        import sys
        from tinysr_kernels.cli.main import main
        try:
            main(["--help"])
        except SystemExit as stop:
            assert not stop.code, stop.code
        assert not {"torch", "triton"} & set(sys.modules)
        """
    )
    assert "upscale" in out


def test_works_without_triton_and_leaves_the_gpu_alone() -> None:
    """Where Triton cannot be imported the reference backend enlarges; loading it starts neither CUDA nor Inductor."""
    out = run_python(
        """
        import sys

        class NoTriton:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] == "triton":
                    raise ImportError("triton is not installed")

        sys.meta_path.insert(0, NoTriton())
        import torch
        torch.set_num_threads(1)
        import tinysr_kernels
        tinysr_kernels.ops
        assert not torch.cuda.is_initialized()
        assert "torch._inductor" not in sys.modules
        model = tinysr_kernels.compile("demo", device="cpu")
        print(*model(torch.rand(3, 6, 9)).shape)
        assert "torch._dynamo" not in sys.modules  # PyTorch's compiler
        """
    )
    assert out == "3 24 36"


def test_unknown_name_of_the_face() -> None:
    import tinysr_kernels

    with pytest.raises(AttributeError, match="no_such_name"):
        _ = tinysr_kernels.no_such_name


def test_every_public_name_of_the_face_exists() -> None:
    import tinysr_kernels

    for name in tinysr_kernels.__all__:
        assert getattr(tinysr_kernels, name) is not None


@pytest.mark.parametrize("folder", [PACKAGE, "model", "tests", "docs", ".ci", "benchmarks", "autotune", "examples"])
def test_files_can_be_read_at_a_sitting(folder: str) -> None:
    for path in python_files(folder):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= LINE_LIMIT, f"{path.relative_to(ROOT)} has {lines} lines"


def test_version_is_the_one_the_changelog_opens_with() -> None:
    import tinysr_kernels

    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert tinysr_kernels.__version__ in headings
    assert next(h for h in headings if h != "Unreleased") == tinysr_kernels.__version__


def test_constraints_pin_torch_exactly() -> None:
    """A range would fetch the newest build with its CUDA libraries (constraints.txt)."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert sum(line.startswith("torch==") for line in pins) == 1
    assert all("==" in line for line in pins)


DOCUMENTS = sorted(p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_of_documents_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_make_targets_in_documents_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = re.findall(r"(?:`|^\s*(?:\$ )?)make ([a-z][a-z-]*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets


def test_architecture_lists_every_operator() -> None:
    import tinysr_kernels

    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [name for name in tinysr_kernels.ops.REGISTRY if f"`{name}`" not in text] == []


def test_documents_name_every_configuration_field() -> None:
    """docs/checkpoints.md defines tinysr-unet: its table has the fields and the defaults that the code has."""
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    for name, value in config_to_dict(UNetConfig()).items():
        rows = [line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]]
        assert len(rows) == 1, f"{name}: expected one row, found {len(rows)}"
        names, defaults = ([cell.strip() for cell in column.split("`, `")] for column in rows[0].split("|")[1:3])
        default = defaults[[n.strip("`") for n in names].index(name)].strip("`")
        assert json.loads(default) == json.loads(json.dumps(value)), name


def test_documents_name_every_option_of_upscale() -> None:
    usage = run_python('from tinysr_kernels.cli.main import main; main(["upscale", "--help"])')
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    options = set(re.findall(r"--[a-z][a-z-]+", usage)) - {"--help"}
    assert len(options) > 10
    assert sorted(option for option in options if f"`{option}" not in text) == []
