"""The command in the tests' own process."""

from __future__ import annotations

from tinysr_kernels.cli.main import main


def upscale(*arguments: object) -> int:
    """Run `tinysr upscale` -> its exit code."""
    return main(["upscale", "--model", "demo", *map(str, arguments)])
