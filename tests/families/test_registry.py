"""The registry, what every family has to say, and that nobody else tells families apart."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass, replace
from pathlib import Path

import pytest

from tests import ROOT
from tinysr_kernels.errors import InputError
from tinysr_kernels.families import COLOR_FIXES, FAMILIES, check_quantize, config_from_dict, config_to_dict
from tinysr_kernels.families.config import config_from_values
from tinysr_kernels.families.loading import roles_of
from tinysr_kernels.runtime.arguments import DTYPES

families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_says_what_it_has_to(name: str) -> None:
    family = FAMILIES[name]
    assert family.name == name
    assert family.summary
    assert family.dtype in DTYPES
    assert type(family).__doc__
    assert is_dataclass(family.config_class)
    assert family.config_class().color_fix in COLOR_FIXES
    for part in family.parts:
        assert part.description
        assert part.called


@families
def test_configuration_there_and_back(name: str) -> None:
    """Every field as JSON values give it, and none that can be changed afterwards."""
    config = FAMILIES[name].config_class()
    assert config_from_dict(name, {}) == config
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in config_to_dict(config).items()}
    assert config_from_dict(name, listed) == config
    first = fields(config)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(config, first, getattr(config, first))
    assert replace(config) == config


@families
@pytest.mark.parametrize("value", [None, [], [0], "x", {}, -1, True, float("nan"), 10**400])
def test_values_that_no_field_takes(name: str, value: object) -> None:
    for field in fields(FAMILIES[name].config_class):
        with pytest.raises(ValueError, match=field.name):
            config_from_dict(name, {field.name: value})


def test_a_field_of_another_kind_is_its_authors_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        text: str = ""

    with pytest.raises(TypeError, match="text"):
        config_from_values(Odd, {"text": "anything"})


def test_roles_are_unambiguous() -> None:
    """One meaning a role; what shows a family comes before what is only a part."""
    parts = roles_of(FAMILIES).parts
    assert len({part.role for part in parts}) == len(parts)
    firsts = [family.parts[0] for family in FAMILIES.values()]
    assert list(parts[: len(firsts)]) == firsts


@families
def test_quantizations_are_refused_by_name(name: str) -> None:
    for kind in ("fp8", "int4"):
        if kind in FAMILIES[name].quantizations:
            check_quantize(name, kind)
        else:
            with pytest.raises(InputError, match=f"{kind}.*this checkpoint is {name}"):
                check_quantize(name, kind)


# Nobody else tells families apart

HOME = "tinysr_kernels/families/"
BENCHMARKS = "benchmarks/subjects/families.py"
"""The one other place that knows families by name: what is measured of each."""
CONFIGS = {family.config_class.__name__ for family in FAMILIES.values()}


def told_apart(source: str) -> Iterator[str]:
    """Where code names a family or the type of its configuration, which is how it would tell families apart."""
    tree = ast.parse(source)
    texts = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            if node.value in FAMILIES:
                yield f"line {node.lineno}: the family {node.value!r}"
        elif isinstance(node, (ast.Name, ast.Attribute)):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in CONFIGS:
                yield f"line {node.lineno}: the configuration {name}"
        elif isinstance(node, ast.ImportFrom):
            yield from (f"line {node.lineno}: the configuration {a.name}" for a in node.names if a.name in CONFIGS)


FILES = [
    path
    for folder in ("tinysr_kernels", "benchmarks", "autotune")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not str(path.relative_to(ROOT)).startswith((HOME, BENCHMARKS))
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_else_tells_families_apart(path: Path) -> None:
    """Ask the family (`families/base.py`) instead, so that a new one is one file."""
    assert list(told_apart(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "if model.family == 'tinysr-dit': pass",
        "x = family in ('adcsr', 'other')",
        "dtype = {'adcsr': 'bfloat16'}[family]",
        "ok = isinstance(config, TinySRConfig)",
        "ok = isinstance(config, families.UNetConfig)",
        "from tinysr_kernels.families import TinySRConfig as Config",
        "match family:\n    case 'tinysr-unet': pass",
    ],
)
def test_the_search_finds_what_it_is_for(code: str) -> None:
    assert list(told_apart(code))


def test_the_search_leaves_texts_and_look_ups_alone() -> None:
    assert list(told_apart('"""tinysr-dit"""\nx = FAMILIES[model.family].adain')) == []


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / HOME).glob("*.py")))
def test_a_family_is_named_in_its_own_file(name: str) -> None:
    """Inside families/ too, a family's name is a constant of its own file alone."""
    tree = ast.parse((ROOT / HOME / f"{name}.py").read_text(encoding="utf-8"))
    names = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in list(FAMILIES)]
    own = [family.name for family in FAMILIES.values() if type(family).__module__.endswith(f".{name}")]
    assert set(names) <= set(own)
