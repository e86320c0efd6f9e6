"""Damage to JSON: configurations, indexes and the headers of safetensors files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

_NUMBERS = (0, 1, 2, 3, -1, 1.5, -0.0, 1e308, 2**31 - 1, 2**31, 2**47, 2**53 + 1, 2**63, 10**39, 10**100, math.inf,
            math.nan)  # fmt: skip
_TEXTS = ("", "a", "\x1b[2J", "x" * 5000, "\ud800", "../a.safetensors", "/etc/passwd", "F32", "F64", "I8", "BOOL",
          "config.json", "AutoencoderTiny", "AutoencoderKL", "adain", "\0")  # fmt: skip


def _value(random: Random) -> Any:
    kind = random.randrange(8)
    if kind < 3:
        return random.choice(_NUMBERS)
    if kind < 5:
        return random.choice(_TEXTS)
    if kind == 5:
        return random.choice((None, True, False, [], {}, [[]]))
    if kind == 6:
        return [random.choice((*_NUMBERS, *_TEXTS))] * random.choice((1, 2, 4, 9, 1000))
    deep: Any = []
    for _ in range(random.choice((5, 50, 400))):
        deep = [deep] if random.random() < 0.5 else {"a": deep}
    return deep


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) below a value."""
    for key, child in list(value.items()) if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(child, (dict, list)):
            _places(child, found)
    return found


def _change(random: Random, content: dict[str, Any]) -> None:
    for _ in range(random.choice((1, 1, 2, 4))):
        places = _places(content, [])
        if not places:
            return
        parent, key = random.choice(places)
        kind = random.randrange(6)
        if kind < 3:
            parent[key] = _value(random)
        elif kind == 3:
            del parent[key]
        elif kind == 4 and isinstance(parent, dict):
            parent[random.choice((*_TEXTS, f"{key}x"))] = parent.pop(key)
        else:
            parent[key] = random.choice([other[name] for other, name in places])


def _text(random: Random, content: dict[str, Any]) -> bytes:
    text = json.dumps(content)
    kind = random.randrange(12)
    if kind == 0 and content:
        text = text[:-1] + f", {json.dumps(next(iter(content)))}: 1}}"  # a key twice
    elif kind == 1:
        text = "[" * random.choice((10, 100_000)) + text
    elif kind == 2:
        text = text[:-1] + ', "many": ' + json.dumps({str(i): i for i in range(random.choice((10, 100_000)))}) + "}"
    elif kind == 3:
        text = text.replace("1", "9" * random.choice((30, 5000)), 1)
    return text.encode()


def json_file(random: Random, path: Path) -> None:
    """Change values, keys and form of a JSON file."""
    content = json.loads(path.read_bytes())
    _change(random, content)
    path.write_bytes(_text(random, content))


def header_of(random: Random, path: Path) -> None:
    """The same in the header of a safetensors file, or in the configuration within its metadata."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.get("__metadata__", {})
    kind = random.randrange(6)
    if kind < 2 and "config" in metadata:
        config = json.loads(metadata["config"])
        _change(random, config)
        metadata["config"] = _text(random, config).decode()
    elif kind == 2:
        _change(random, metadata)
        header["__metadata__"] = metadata
    elif kind == 3:
        _merge(random, header)
    else:
        _change(random, header)
    text = _text(random, header)
    claimed = random.choice((0, 8, 2**40, 2**63, len(text) + 8)) if random.random() < 0.05 else len(text)
    path.write_bytes(claimed.to_bytes(8, "little") + text + data[8 + length :])


def _merge(random: Random, header: dict[str, Any]) -> None:
    """Give a tensor another's entry, shape or place; consistent shapes pass the reader and reach the network."""
    names = [one for one in header if one != "__metadata__"]
    first, second = header[random.choice(names)], header[random.choice(names)]
    kind = random.randrange(4)
    if kind == 0:
        first.update(second)
    elif kind == 1:
        first["data_offsets"], second["data_offsets"] = second["data_offsets"], first["data_offsets"]
    elif kind == 2:
        first["shape"] = random.choice(([math.prod(first["shape"])], [*first["shape"], 1], first["shape"][::-1]))
    else:
        other = {"F32": "I32", "F16": "BF16", "I32": "F32"}.get(first["dtype"], "F32")
        first["dtype"] = other
