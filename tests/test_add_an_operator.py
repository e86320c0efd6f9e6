"""docs/add-an-operator.md: its code, typed into a copy of the checkout, passes the checks that the page names.

Each block of Python has the line before it that says where it goes; a child process runs the copy. The checkout itself
never has the operator.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

PAGE = (ROOT / "docs" / "add-an-operator.md").read_text(encoding="utf-8")
CASES = "tests/ops/cases.py"
LAYERS = "tinysr_kernels/nets/layers.py"
COMPILE = "build/compile_channel_gain.py"
MAKERS = "_MAKERS: dict[str, dict[str, Callable[[Draw], Arguments]]] = {\n"
SCHEMA = "tinysr::channel_gain(Tensor x, Tensor gain) -> Tensor"
USE = f"""
import torch
from tinysr_kernels.nets.layers import ChannelGain

x, gain = torch.rand(1, 3, 2, 2), torch.tensor([1.0, 2.0, 3.0])
assert torch.equal(ChannelGain({{"a.gain": gain}}, "a")(x), x * gain[:, None, None])
assert str(torch.ops.tinysr.channel_gain.default._schema) == {SCHEMA!r}
"""


def blocks() -> dict[str, str]:
    """Every Python block of the page by the last path that the text before it names."""
    pieces = re.split(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    places = [re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.py)`", text)[-1] for text in pieces[:-1:2]]
    assert len(set(places)) == len(places)
    return dict(zip(places, pieces[1::2], strict=True))


def indented(beginning: str) -> str:
    """The one line of the page that is indented and begins so."""
    (line,) = re.findall(rf"^    ({re.escape(beginning)}.*)$", PAGE, re.MULTILINE)
    return str(line)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in which a reader has done what the page says."""
    tree = tmp_path_factory.mktemp("checkout")
    for name in ("tinysr_kernels", "tests", "benchmarks", "autotune"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "model").symlink_to(ROOT / "model")
    (tree / "build").mkdir()
    shutil.copy(ROOT / "pyproject.toml", tree)
    added = blocks()
    replaced = {CASES: (MAKERS, MAKERS + added.pop(CASES)), LAYERS: ("", added.pop(LAYERS))}
    for name, (old, new) in replaced.items():
        text = (tree / name).read_text(encoding="utf-8")
        changed = text.replace(old, new, 1) if old else f"{text}\n\n{new}"
        assert changed != text
        (tree / name).write_text(changed, encoding="utf-8")
    with (tree / "tinysr_kernels/ops/__init__.py").open("a", encoding="utf-8") as registry:
        registry.write(f"\n{indented('from tinysr_kernels.ops.image')}\n")
    for name, code in added.items():
        assert not (tree / name).exists(), name
        (tree / name).write_text(code, encoding="utf-8")
    return tree


def run(tree: Path, *arguments: str) -> str:
    """Python in the copy: its output, where it succeeds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(tree / "build" / "triton")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_has_every_file() -> None:
    kernels, operator = "tinysr_kernels/ops/image/kernels/channel_gain.py", "tinysr_kernels/ops/image/channel_gain.py"
    tests = ["tests/ops/image/test_channel_gain.py", "tests/ops/image/test_channel_gain_kernel.py"]
    assert list(blocks()) == [kernels, operator, CASES, *tests, COMPILE, LAYERS]
    assert SCHEMA in PAGE
    assert "| Operator | Computes |" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert re.fullmatch(r"\| `channel_gain` \| [^|]+ \|", indented("| `channel_gain`"))


@pytest.mark.long
def test_the_operator_passes_its_contracts(tree: Path) -> None:
    """Reference, kernels and mutations; and what is asked of every operator by itself."""
    every = ["tests/ops/test_registry.py", "tests/launch/test_configs.py", "tests/first_use/test_correctness.py"]
    chosen = "ChannelGain or channel_gain or test_every_operator_has_cases"
    told = run(tree, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/ops/image", *every, "-k", chosen)
    passed = re.search(r"^(\d+) passed, \d+ deselected", told, re.MULTILINE)
    assert passed is not None, told
    assert int(passed[1]) > 80


def test_the_layer_calls_it(tree: Path) -> None:
    run(tree, "-c", USE)


@pytest.mark.long
def test_it_compiles_without_a_network(tree: Path) -> None:
    """On one architecture, and the page says how many kernels that are."""
    told = run(tree, COMPILE, "--arch", "90")
    assert told.splitlines()[-1] == "2 kernels, 2 of them compiled, 0 with faults"
    assert "(2 for one architecture)" in PAGE
