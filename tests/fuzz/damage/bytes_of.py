"""Damage to bytes: flips and cuts anywhere, other opcodes in a pickle, records that lie, pickles made to harm."""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from itertools import pairwise
from pathlib import Path
from random import Random

from tests.checkpoint.read.craft import MEMO, RECALL, call, integer, name, state, storage, tensor, text, tuple_of


def anything(random: Random, path: Path) -> None:
    """Flip, cut, insert, repeat or zero some bytes."""
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else len(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(min(len(data), header) + 1) if data else 0
        span = random.choice((1, 2, 4, 8, 40, 1000))
        kind = random.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << random.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + span]
        elif kind == 3:
            data[at:at] = random.randbytes(span)
        elif kind == 4:
            data[at:at] = data[at : at + span]
        elif kind == 5:
            data[at : at + span] = bytes(len(data[at : at + span]))
        else:
            data[at : at + span] = b"\xff" * len(data[at : at + span])
    path.write_bytes(data)


def _rewrite(path: Path, change: dict[str, bytes | None], random: Random | None = None) -> None:
    """Write the archive again with these records replaced, or left out; a random one may come twice or compressed."""
    written = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(written, "w") as new, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names that occur twice
        for info in old.infolist():
            content = change.get(info.filename, old.read(info))
            if content is None:
                continue
            packed = random is not None and random.random() < 0.1
            new.writestr(info.filename, content, zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED)
            if random is not None and random.random() < 0.05:
                new.writestr(info.filename, content)
    path.write_bytes(written.getvalue())


def _pickle_name(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        return next(one for one in archive.namelist() if one.endswith("data.pkl"))


def record_of(random: Random, path: Path) -> None:
    """Change the length of a record, leave it out, or name the byte order otherwise."""
    with zipfile.ZipFile(path) as archive:
        which = random.choice(archive.namelist())
        content = archive.read(which)
    choices: list[bytes | None] = [None, b"", content[: len(content) // 2], content + bytes(4), b"big", content[:-1]]
    choices.append(random.randbytes(len(content)))
    _rewrite(path, {which: random.choice(choices)}, random)


def pickle_in(random: Random, path: Path) -> None:
    """Drop, repeat, swap or replace opcodes, or change their arguments, with a right checksum."""
    which = _pickle_name(path)
    with zipfile.ZipFile(path) as archive:
        data = archive.read(which)
    ends = [position for _, _, position in pickletools.genops(data)] + [len(data)]
    steps = [data[a:b] for a, b in pairwise(ends)]
    for _ in range(random.choice((1, 1, 2, 5))):
        at = random.randrange(len(steps))
        kind = random.randrange(5)
        if kind == 0:
            del steps[at]
        elif kind == 1:
            steps[at:at] = [steps[at]] * random.choice((1, 2, 1000))
        elif kind == 2:
            steps[at] = random.choice(steps)
        elif kind == 3:
            steps[at] = bytes([random.randrange(256)]) + steps[at][1:]
        else:
            steps[at] = steps[at][:1] + random.randbytes(len(steps[at]) - 1)
    _rewrite(path, {which: b"".join(steps)})


def hostile_pickle(random: Random, path: Path) -> None:
    """Put a pickle made to harm into the archive, or in the file's place."""
    data = _hostile(random)
    if random.random() < 0.2 or not zipfile.is_zipfile(path):
        path.write_bytes(data)
    else:
        _rewrite(path, {_pickle_name(path): data})


def _hostile(random: Random) -> bytes:
    count = random.choice((2, 30, 100, 20_000))
    number = random.choice((0, 1, -1, 2**31, 2**47, 2**62, 2**63, 2**64, -(2**63), 2**2000))
    doubled = b")" + MEMO + (RECALL + b"\x86" + MEMO) * count
    tensors = [
        tensor(2, (2,)),
        tensor(number, (2,)),
        tensor(2, (number,)),
        tensor(2, (2,), stride=(number,)),
        tensor(2, (2,), offset=number),
        tensor(2, (number, number), (0, 0)),
        tensor(2, (1,) * count, (0,) * count),
        call("torch._utils", "_rebuild_parameter", tensor(2, (2,)), b"\x89", b"N"),
    ]
    values = [
        *tensors,
        doubled,
        b")" + b"\x85" * count * 10,
        b"(" * count,
        b"(]" + MEMO + (b"]" + RECALL + b"a" + RECALL + b"a" + MEMO) * count + b"t",
        b"]" + MEMO + RECALL + b"a",
        b"}" + MEMO + text("state_dict") + RECALL + b"s",
        call("builtins", "bytearray", integer(number)),
        call("torch", random.choice(("Size", "Tensor", "device", "FloatTensor")), integer(number)),
        call("posix", "mkdir", text("it-ran")),
        call("builtins", "exec", text("open('it-ran', 'w')")),
        name(
            random.choice(("torch", "os", "builtins", "torch._utils")), random.choice(("hub", "system", "eval", "load"))
        ),
        storage(number),
        tuple_of(text("storage"), doubled, doubled, doubled, doubled) + b"Q",
        b"X" + struct.pack("<I", number % 2**32),
        b"\x8b" + struct.pack("<i", number % 2**31) + b"\x01" * 100,
        integer(number),
        text("x" * count),
    ]
    keys = [text("a"), text("a"), text("state_dict"), text("\x1b[2J" * count), integer(number), doubled, b")", b"N"]
    items = [(random.choice(keys), random.choice(values)) for _ in range(random.choice((1, 2, 5)))]
    kept = [(text(f"unet.{i}.weight"), random.choice(tensors)) for i in range(random.choice((0, 1, 50)))]
    return random.choice((state(*kept, *items), b"\x80\x02" + random.choice(values) + b"."))
