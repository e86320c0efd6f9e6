"""Launch configuration files for the tests: one entry, for one call of sepconv on an H200."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.device import GPUS, Gpu
from tinysr_kernels.ops import REGISTRY

H200 = GPUS[90]
MEASURED = {"form": "tile", "rows": 1, "block_m": 16, "block_k": 32, "block_n": 64, "num_warps": 4, "num_stages": 3}
OPERATOR = REGISTRY["sepconv"]
CALL = OPERATOR(
    torch.empty(1, 64, 32, 32, dtype=torch.float16, device="meta"),
    torch.empty(64, 3, 3, dtype=torch.float16, device="meta"),
    torch.empty(64, 64, dtype=torch.float16, device="meta"),
)
BUCKET = CALL.bucket()
HASHES = config_file.hashes_of(OPERATOR)
DEVICE = {
    "name": H200.name,
    "capability": [9, 0],
    "multiprocessors": 132,
    "memory_mib": 143771,
    "power_limit_w": 700,
}


def entry(config: object = MEASURED, **changes: object) -> dict:
    raw = {"config": config, "time_us": 5.5, "incumbent_us": 7.0, "candidates": 40, **changes}
    return {**raw, "seal": config_file.seal("sepconv", BUCKET, HASHES, raw)}


def content(one: object = None, **changes: object) -> dict:
    return {
        "schema": 1,
        "device": DEVICE,
        "driver": "570.10",
        "triton": config_file.installed("triton"),
        "torch": config_file.installed("torch"),
        "operations": {"sepconv": {**HASHES, "entries": {BUCKET: entry() if one is None else one}}},
        **changes,
    }


def operation(**changes: object) -> dict:
    return {"sepconv": {**HASHES, "entries": {BUCKET: entry()}, **changes}}


def without(table: dict, name: str) -> dict:
    return {k: v for k, v in table.items() if k != name}


def write(folder: Path, data: object, gpu: Gpu = H200) -> str:
    path = folder / configs.file_name(gpu.name)
    if isinstance(data, bytes):
        path.write_bytes(data)
    else:
        path.write_text(json.dumps(data), encoding="utf-8")
    configs.forget()
    return str(path)


def choose(gpu: Gpu = H200) -> configs.Choice:
    return CALL.choose(gpu)


@contextlib.contextmanager
def notices() -> Iterator[list[str]]:
    """The messages logged within the block."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    configs.logger.addHandler(handler)
    try:
        yield messages
    finally:
        configs.logger.removeHandler(handler)
