"""Tests run on the CPU, also on a machine with GPUs, unless a GPU is asked for."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import pytest
import torch

from tests import GPU_VARIABLES, ROOT

SCRIPT = f"import os, tests; print(*(os.environ.get(name, 'none') for name in {GPU_VARIABLES!r}))"


@pytest.mark.parametrize(
    ("interpret", "expected"), [(None, "-1 -1 -1"), ("1", "-1 -1 -1"), ("0", "0,1 none none")], ids=str
)
def test_whatever_the_machine_has(interpret: str | None, expected: str) -> None:
    """By the package of the tests, which every test, fuzzer and helper is in, and before torch is imported."""
    inherited = {k: v for k, v in os.environ.items() if k not in (*GPU_VARIABLES, "TRITON_INTERPRET")}
    inherited |= {"CUDA_VISIBLE_DEVICES": "0,1", "PYTHONPATH": str(ROOT)}
    inherited |= {} if interpret is None else {"TRITON_INTERPRET": interpret}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=inherited, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "0", reason="a GPU is asked for")
def test_torch_finds_none() -> None:
    assert {os.environ[name] for name in GPU_VARIABLES} == {"-1"}
    assert torch.cuda._parse_visible_devices() == []
    assert not torch.cuda.is_available()


def test_children_inherit_it() -> None:
    """No test starts a process with an environment made from nothing."""
    bare = []
    for path in (ROOT / "tests").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "env={" in text else ():
            if isinstance(node, ast.keyword) and node.arg == "env" and isinstance(node.value, ast.Dict):
                bare += [] if None in node.value.keys else [f"{path}:{node.value.lineno}"]
    assert bare == []
