"""What can stand where a tuning file should be, for the fuzzer of configurations."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import socket
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinysr_kernels.launch import config_file, configs
from tinysr_kernels.launch.config_file import Facts
from tinysr_kernels.launch.device import GPUS

H200 = GPUS[90]
NUMBERS = (-1, 0, 1, 2, 3, 5, 7, 12, 16, 24, 33, 64, 128, 255, 256, 512, 1024, 4096, 65536, 1 << 20, 1 << 31, 1 << 63)
ODD = (None, True, False, "", "4", "tile", "library", 1.5, -0.0, 1e308, float("inf"), [], {}, [4], 10**400, "\ud800")


def content(facts: Facts, entries: Mapping[tuple[type, str], Any]) -> dict[str, Any]:
    """A valid file."""
    operations: dict[str, Any] = {}
    for (operator, bucket), config in entries.items():
        hashes = config_file.hashes_of(operator)
        raw = {"config": dataclasses.asdict(config), "time_us": 5.5, "incumbent_us": 7.0, "candidates": 40}
        operation = operations.setdefault(operator.name, {**hashes, "entries": {}})
        operation["entries"][bucket] = {**raw, "seal": config_file.seal(operator.name, bucket, hashes, raw)}
    gpu = facts.gpu
    device = {"name": gpu.name, "capability": list(gpu.capability), "multiprocessors": gpu.multiprocessors}
    device |= {"memory_mib": facts.memory_mib, "power_limit_w": facts.power_limit_w}
    versions = {"driver": facts.driver, "triton": facts.triton, "torch": facts.torch}
    return {"schema": 1, "device": device, **versions, "operations": operations}


def plain(value: Any) -> Any:
    """A dataclass as JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def lay(rng: random.Random, folder: Path, data: dict[str, Any]) -> tuple[Path, bool]:
    """Put a file into the user's folder; its path, and whether the folder is an ordinary one."""
    home = folder / rng.choice(["user", "us\udcffer", "a\nb\x1b[31m", "u" * 200])
    home.mkdir()
    os.environ[configs.USER_FOLDER] = str(home)
    gpu = H200
    if rng.random() < 0.1:
        os.environ[configs.NEAREST] = "1"
        gpu = dataclasses.replace(H200, name="NVIDIA H100 NVL")
        data["device"]["name"] = gpu.name
    path = home / configs.file_name(gpu.name)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        rng.choice(CHANGES)(rng, data)
    if rng.random() < 0.1:
        _odd_folder(rng, home)
        return configs.user_file(H200.name), False
    lay_json(rng, path, data)
    return configs.user_file(H200.name), True


def lay_json(rng: random.Random, path: Path, data: Any) -> None:
    """Write a JSON value, in one case of four as damaged bytes or as no file at all."""
    for _ in range(rng.choice([0, 0, 0, 1])):
        rng.choice([replace_value, remove_value, rename_key])(rng, data)
    text = json.dumps(data)
    if rng.random() < 0.25:
        rng.choice(FILES)(rng, path, text)
    else:
        path.write_text(text)


def lay_log(rng: random.Random, path: Path) -> list[tuple[str, str, str]]:
    """Write a log of measurements, some of them odd but with the right checksum; the keys of its records."""
    kinds: dict[str, dict[str, Any]] = {
        "sample": {"us": 1.5, "clock": 1, "disturbed": "", "retried": [[1.0, 2, "slow"]]},
        "build": {"resources": [[32, 1024]], "faults": []},
        "check 0": {},
        "check 1": {"failure": ["wrong", "by 3"]},
    }
    lines = []
    for what, values in kinds.items():
        record = {"what": what, "subject": "i", "config": "{}", "stamp": "stamp", "seconds": 0.1, **values}
        for _ in range(rng.choice([0, 0, 1, 2])):
            rng.choice([replace_value, remove_value])(rng, record)
        text = json.dumps(record, sort_keys=True)
        lines.append(f"{zlib.crc32(text.encode()):08x} {text}\n")
    if rng.random() < 0.25:
        rng.choice(FILES)(rng, path, "".join(lines))
    else:
        path.write_text("".join(lines))
    return [(what, "i", "{}") for what in kinds]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def replace_value(rng: random.Random, data: Any) -> None:
    """Another value anywhere."""
    places = list(_places(data))
    if places:
        table, key = rng.choice(places)
        table[key] = rng.choice([rng.choice(NUMBERS), rng.choice(ODD)])


def remove_value(rng: random.Random, data: Any) -> None:
    """A value less."""
    places = list(_places(data))
    if places:
        table, key = rng.choice(places)
        del table[key]


def rename_key(rng: random.Random, data: Any) -> None:
    """A name that nobody expects."""
    places = [(table, key) for table, key in _places(data) if isinstance(table, dict)]
    if places:
        table, key = rng.choice(places)
        table[rng.choice(["x", "", "\x1b[31m", "\ud800", "a" * 1000])] = table.pop(key)


def hostile_config(rng: random.Random, data: Any) -> None:
    """Other numbers in an entry, with the seal of whoever wrote them."""
    op, bucket, entry = _pick(rng, data)
    config = entry.get("config")
    if isinstance(config, dict) and config:
        for key in rng.sample(sorted(config), min(rng.choice([1, 1, 2, 9]), len(config))):
            config[key] = rng.choice(NUMBERS) if rng.random() < 0.8 else rng.choice(ODD)
    _seal(data, op, bucket, entry)


def hostile_entry(rng: random.Random, data: Any) -> None:
    """Other times, environments or fields in an entry, sealed."""
    op, bucket, entry = _pick(rng, data)
    key = rng.choice(["time_us", "incumbent_us", "candidates", "environment", "config", "more"])
    entry[key] = rng.choice([*NUMBERS, *ODD, {"triton": "0.0", "torch": 5}, {"driver": "1"}])
    _seal(data, op, bucket, entry)


def foreign_entry(rng: random.Random, data: Any) -> None:
    """The configuration of another operator, or of another bucket, sealed."""
    op, bucket, entry = _pick(rng, data)
    entry["config"] = _pick(rng, data)[2].get("config")
    _seal(data, op, bucket, entry)


def many_entries(rng: random.Random, data: Any) -> None:
    """Hundreds of bad entries, each bad in its own way."""
    op, _, entry = _pick(rng, data)
    entries = data.get("operations", {}).get(op, {}).get("entries")
    if isinstance(entries, dict):
        for n in range(300):
            entries[f"bucket {n}"] = {**entry, "time_us": n}


CHANGES = [hostile_config] * 5 + [hostile_entry] * 2 + [foreign_entry, many_entries, replace_value, remove_value]


def _pick(rng: random.Random, data: Any) -> tuple[str, str, dict[str, Any]]:
    tables = data.get("operations")
    operations = [(op, t) for op, t in (tables.items() if isinstance(tables, dict) else ()) if isinstance(t, dict)]
    every = [
        (op, bucket, entry)
        for op, table in operations
        if isinstance(table.get("entries"), dict)
        for bucket, entry in table["entries"].items()
        if isinstance(entry, dict)
    ]
    return rng.choice(every) if every else ("", "", {})


def _seal(data: Any, op: str, bucket: str, entry: dict[str, Any]) -> None:
    if op and all(name in data["operations"][op] for name in config_file.WHAT):
        entry["seal"] = config_file.seal(op, bucket, data["operations"][op], entry)


def _odd_folder(rng: random.Random, home: Path) -> None:
    """TINYSR_CONFIG_DIR is empty, missing, a file, relative, a loop, or too long."""
    file = home / "file"
    file.write_text("")
    (home / "loop").symlink_to(home / "loop")
    odd = [
        "",
        str(home / "none"),
        str(file),
        str(file / "x"),
        "relative",
        str(home / "loop"),
        "/" + "x" * 5000,
        "\udcff",
    ]
    os.environ[configs.USER_FOLDER] = rng.choice(odd)


def _bytes(rng: random.Random, path: Path, text: str) -> None:
    raw = bytearray(text.encode())
    for _ in range(rng.choice([1, 3, 30])):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    path.write_bytes(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])


def _text(rng: random.Random, path: Path, text: str) -> None:
    odd = ["", "[]", "null", "1e999", "NaN", "[" * 5000, '{"a":' * 40 + "1" + "}" * 40, "\ufeff" + text, text + text]
    odd += [text.replace("{", '{"schema": 1,', 1), text.replace("5.5", "1e999"), text.replace("40", "9" * 5000)]
    path.write_text(rng.choice(odd))


def _fifo(rng: random.Random, path: Path, text: str) -> None:
    os.mkfifo(path)


def _folder(rng: random.Random, path: Path, text: str) -> None:
    path.mkdir()


def _socket(rng: random.Random, path: Path, text: str) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        before = os.getcwd()
        os.chdir(path.parent)  # addresses are short
        try:
            one.bind(path.name)
        finally:
            os.chdir(before)


def _link(rng: random.Random, path: Path, text: str) -> None:
    """To a file, to nothing, to itself, to a FIFO or a folder; all inside the folder of the case."""
    target = path.parent / "elsewhere"
    kind = rng.choice(["file", "other", "nothing", "itself", "fifo", "folder"])
    if kind in ("file", "other"):
        target.write_text(text if kind == "file" else "a letter")
    elif kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    path.symlink_to(path if kind == "itself" else target)


def _large(rng: random.Random, path: Path, text: str) -> None:
    with open(path, "wb") as file:
        file.truncate(rng.choice([5 << 20, 70 << 20, 1 << 40]))


FILES: list[Callable[[random.Random, Path, str], None]] = [
    _bytes,
    _bytes,
    _text,
    _fifo,
    _folder,
    _socket,
    _link,
    _large,
]
