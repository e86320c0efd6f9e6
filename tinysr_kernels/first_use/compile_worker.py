"""A process that compiles kernels into Triton's cache on disk: `compile_ahead.py` starts several.

The first line of its input is the architecture, each further line a kernel with arguments; each is answered by a line
once it is compiled. It ends with its input, and needs no GPU.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

import torch

from tinysr_kernels.first_use.target import TargetDriver
from tinysr_kernels.launch.plan import Launch

ANSWERS = ("compiled", "failed")
"""How an answer begins; whatever else is printed is none."""


def describe(launch: Launch, options: dict[str, Any]) -> str:
    """The launch as a line of JSON. options: of the launch, as Triton names them."""
    arguments = {name: _to_json(value) for name, value in launch.arguments.items()}
    function = launch.kernel.function
    return json.dumps([function.__module__, function.__qualname__, arguments, options])


def _to_json(value: Any) -> Any:
    """Of a tensor what Triton looks at: the dtype, and the address up to the multiple of an allocation."""
    if not isinstance(value, torch.Tensor):
        return value
    return {"dtype": str(value.dtype).removeprefix("torch."), "offset": value.storage_offset()}


def _from_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    offset = value["offset"]
    return torch.empty(offset + 1, dtype=getattr(torch, value["dtype"]), device="meta")[offset:]


def compile_line(line: str) -> None:
    """Compile what the line describes, or find it in the cache. Raises what Triton raises."""
    module, name, arguments, options = json.loads(line)
    kernel = getattr(importlib.import_module(module), name)
    values = {key: _from_json(value) for key, value in arguments.items()}
    kernel.made.run(**values, **options, grid=None, warmup=True)


def main() -> None:
    """Compile what the input names."""
    from triton.runtime import driver

    # What kernels or Triton print goes nowhere: Triton prints the whole PTX where ptxas fails.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    driver.set_active(TargetDriver(int(sys.stdin.readline())))
    for line in sys.stdin:
        try:
            compile_line(line)
        except Exception as error:  # noqa: BLE001  the first launch meets it again, where it is handled
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")[:500]
            print(f"failed: {reason}", file=answers, flush=True)
        else:
            print("compiled", file=answers, flush=True)


if __name__ == "__main__":
    main()
