"""Constructors of tensors name their device and dtype: the defaults that torch lets a user set are the user's."""

from __future__ import annotations

import ast

import pytest

from tests.test_house import MODULES

# Those that take the default device unless told; of them, those whose dtype does not follow from their arguments.
PLACED = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "hann_window", "linspace", "logspace"),
    *("normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "tril_indices"),
    *("triu_indices", "zeros"),
}
TYPED = PLACED - {"as_tensor", "asarray", "randint", "randperm", "tril_indices", "triu_indices"}


def unplaced(source: str) -> list[str]:
    """Calls such as `torch.zeros(3)` that leave a device or a dtype to the default, as `line: text`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch":
            continue
        name, given = node.func.attr, {keyword.arg for keyword in node.keywords}
        missing = {"device"} if name in PLACED else set()
        missing |= {"dtype"} if name in TYPED else set()
        if missing - given and None not in given:  # None: **options
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_constructors_name_device_and_dtype(module: str) -> None:
    assert unplaced(MODULES[module].read_text(encoding="utf-8")) == []


def test_the_rule_finds_what_it_is_for() -> None:
    assert unplaced("torch.zeros(3)") == ["1: torch.zeros(3)"]
    assert unplaced("torch.zeros(3, dtype=torch.float32)") == ["1: torch.zeros(3, dtype=torch.float32)"]
    assert unplaced("torch.arange(3, device=x.device)") == ["1: torch.arange(3, device=x.device)"]
    assert unplaced("torch.tensor([1.0])") == ["1: torch.tensor([1.0])"]
    for fine in ("torch.zeros(3, dtype=d, device=c)", "x.new_zeros(3)", "torch.empty_like(x)", "torch.full(s, 1, **o)"):
        assert unplaced(fine) == []
