"""Tuning files, logs and result files: damaged, hostile, stale, or not files at all.

"accepted": a call got a configuration of the file; "ignored": all calls got the heuristic's. Whatever the file is, a
look-up raises nothing, says little, and its configuration can be launched.
"""

from __future__ import annotations

import copy
import logging
import os
import random
from pathlib import Path
from typing import Any

from autotune.items.candidates import candidates
from autotune.items.log import Log
from autotune.items.work import Item, Target, all_items
from autotune.search.store import NewEntry, export, merge
from benchmarks.measure.results import Record, Results, read
from benchmarks.reports.report import report
from tests.fuzz import tuning_files
from tests.fuzz.tuning_files import H200
from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.config_file import Facts
from tinysr_kernels.launch.device import assume
from tinysr_kernels.launch.json_file import BadFile
from tinysr_kernels.launch.plan import Launch
from tinysr_kernels.ops import REGISTRY

FACTS = Facts(H200, config_file.installed("triton"), config_file.installed("torch"), "570.10", 143771, 700)
ITEMS: list[Item] = []
VALID: dict[str, Any] = {}
NOTICES: list[str] = []


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        NOTICES.append(record.getMessage())


def setup() -> None:
    """One call of each operator of a network, and a valid file with an entry for each."""
    networks = [Target(family) for family in ("tinysr-dit", "tinysr-unet", "adcsr")]
    by_op = {item.op: item for item in all_items(networks, H200)}
    ITEMS.extend(by_op.values())
    picked = {item.key: candidates(item, H200, item.call.heuristic(H200)).all[-1].config for item in ITEMS}
    VALID.update(tuning_files.content(FACTS, {(type(item.call), item.bucket): picked[item.key] for item in ITEMS}))
    configs.logger.addHandler(_Listener())
    configs.logger.propagate = False


def case(seed: int, folder: Path) -> str:
    """A tuning file; in one case of eight a log or a result file."""
    rng = random.Random(seed)
    if seed % 8 == 6:
        return _log(rng, folder / "log.jsonl")
    if seed % 8 == 7:
        return _results(rng, folder / "micro.json")
    NOTICES.clear()
    os.environ.pop(configs.NEAREST, None)
    configs.forget()
    file, altered = tuning_files.lay(rng, folder, copy.deepcopy(VALID))
    sources = [_check_choice(item) for item in rng.sample(ITEMS, 8)]
    configs.pdl(H200)
    files = {os.path.dirname(source) for source in sources}
    # A line each for the file, its entries, those that calls cannot use, and differences; of two files at most.
    assert len(NOTICES) <= 5, NOTICES
    assert all(len(notice) < 2000 and notice.isprintable() for notice in NOTICES), NOTICES
    if altered and seed % 3 == 0:
        _check_merge(rng, file)
    return "accepted" if files != {""} else "ignored"


def _check_choice(item: Item) -> str:
    """The source of the call's configuration, which can be launched; "" for the heuristic."""
    choice = item.call.choose(H200)
    with assume(H200):
        plan = item.call.plan(choice.config)
    for launch in plan.launches:
        if isinstance(launch, Launch):
            sizes = [v for k, v in launch.arguments.items() if "BLOCK" in k or k == "TILE_WIDTH"]
            assert launch.num_warps in (1, 2, 4, 8, 16, 32)
            assert 1 <= launch.num_stages <= 4
            assert all(0 <= size <= 4096 and size & (size - 1) == 0 for size in sizes), launch.arguments
            assert all(1 <= blocks < 1 << 31 for blocks in launch.grid)
    return "" if choice.source == "heuristic" else choice.source


def _check_merge(rng: random.Random, file: Path) -> None:
    """Writing keeps every valid entry, adds its own, and leaves a file that can be read."""
    content, obstacle = config_file.read(file)
    usable = not obstacle and not config_file.conflicts(content, FACTS)
    before = config_file.entries(content, FACTS, REGISTRY).valid if usable else {}
    item = rng.choice(ITEMS)
    config = item.call.heuristic(H200)
    elsewhere = file.with_name("elsewhere")
    target = elsewhere.lstat() if os.path.lexists(elsewhere) else None
    try:
        merge(file, FACTS, [NewEntry(type(item.call), item.bucket, config, 1e-3, 2e-3, 1)])
    except OSError:  # no folder can be made there
        return
    content, obstacle = config_file.read(file)
    assert not obstacle
    after = config_file.entries(content, FACTS, REGISTRY).valid
    assert set(before) | {(item.op, item.bucket)} <= set(after)
    assert export(file, FACTS, REGISTRY)["operations"]
    if target is not None:  # what a link led to
        assert (elsewhere.lstat().st_mode, elsewhere.lstat().st_mtime_ns) == (target.st_mode, target.st_mtime_ns)


def _log(rng: random.Random, path: Path) -> str:
    """Everything that the search reads of a record is there, in the right type."""
    keys = tuning_files.lay_log(rng, path)
    try:
        log = Log(path)
    except (BadFile, OSError):
        return "refused"
    found = [record for key in keys for _ in range(3) if (record := log.next(key, "stamp")) is not None]
    for record in found:
        assert record["seconds"] >= 0
        if record["what"] == "build":
            assert all(isinstance(a + b, (int, float)) for a, b in record["resources"])
        elif "failure" in record:
            kind, detail = record["failure"]
            assert kind + detail is not None
        elif record["what"] == "sample":
            assert float(record["us"]) > 0
            assert len(record["retried"]) >= 0
    return "accepted" if found else "ignored"


def _results(rng: random.Random, path: Path) -> str:
    """A result file is read, or refused by name; a report is made of whatever was read."""
    record = Record("a", {"op": "linear", "dtype": "float16", "shapes": "1x2", "peer": "ours"}, [1.0, 2.0], ["", ""])
    record.values = {"p50_us": 1.5, "tflops": 1.0, "gbs": 2.0, "of_floor": 0.5}
    whole = Results(1, rng.choice(["micro", "e2e", "cpu", "quality"]), "CPU", True, {"torch": "2"}, "now", "now", True)
    whole.records = [record]
    tuning_files.lay_json(rng, path, tuning_files.plain(whole))
    try:
        found = read(path)
    except (BadFile, OSError) as error:
        refusal = error
    else:
        report({found.command: found})
        return "accepted"
    assert len(str(refusal)) < 2000
    return "refused"
