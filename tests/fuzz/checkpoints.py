"""Damaged and hostile checkpoint files and folders, given to `compile` or to the loader.

A case copies a small checkpoint in one of the layouts, damages it up to three times (now and then not at all), loads it
and touches every tensor.
"""

from __future__ import annotations

import atexit
import contextlib
import random
import shutil
import tempfile
from pathlib import Path

import torch

import tinysr_kernels
from tests.fuzz.damage import bytes_of, files, texts
from tests.layouts.adcsr import write_adcsr
from tests.layouts.tinysr import write_tinysr
from tests.layouts.unet import write_unet
from tinysr_kernels.errors import CheckpointError
from tinysr_kernels.families import UNetConfig, load

SECONDS = 30.0
MEMORY = 1 << 30
_SAMPLES = Path(tempfile.gettempdir())


def setup() -> None:
    """Write the sample checkpoints once."""
    global _SAMPLES
    _SAMPLES = Path(tempfile.mkdtemp(prefix="fuzz-checkpoints-samples-"))
    atexit.register(shutil.rmtree, _SAMPLES, ignore_errors=True)
    write_unet(_SAMPLES / "unet" / "model.safetensors")
    write_unet(_SAMPLES / "temb", time="temb")
    tiny = UNetConfig(input="vae", color_fix="none", encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1))
    write_unet(_SAMPLES / "vae" / "model.safetensors", tiny, decoder="tiny")
    adcsr = {"channels": (48, 48), "layers": 1, "decoder_channels": (8, 8, 8, 8)}
    write_adcsr(_SAMPLES / "adcsr", **adcsr)  # type: ignore[arg-type]
    write_tinysr(_SAMPLES / "tinysr", lora=True, dim=64, layers=1)
    write_tinysr(_SAMPLES / "shards", sharded=True, dim=64, layers=1)
    write_tinysr(_SAMPLES / "bins", as_bin=True, conditioning="temb", dim=64, layers=1)
    model = tinysr_kernels.compile(_SAMPLES / "unet", device="cpu", backend="reference")
    (_SAMPLES / "folded").mkdir()
    model.save(_SAMPLES / "folded" / "model.safetensors")
    state = torch.load(next((_SAMPLES / "bins").rglob("*.bin")), weights_only=True)
    torch.save(state, _SAMPLES / "old.bin", _use_new_zipfile_serialization=False)


def case(seed: int, folder: Path) -> str:
    """See the module."""
    random_ = random.Random(seed)
    kind = random_.choice(sorted(path.name for path in _SAMPLES.iterdir() if path.is_dir()))
    ckpt = folder / "checkpoint"
    shutil.copytree(_SAMPLES / kind, ckpt)
    if kind == "bins" and random_.random() < 0.3:  # the older format of torch.save
        shutil.copy(_SAMPLES / "old.bin", random_.choice(sorted(ckpt.rglob("*.bin"))))
    for _ in range(random_.choice((0, 1, 1, 1, 1, 2, 3))):
        _damage(random_, ckpt)
    given = [path for path in sorted(ckpt.rglob("*")) if path.suffix not in (".json", "")]
    target = random_.choice(given) if given and random_.random() < 0.2 else ckpt
    try:
        if random_.random() < 0.1:
            tinysr_kernels.compile(target, device="cpu", backend="reference")
        else:
            for tensor in load(target).tensors.values():
                tensor.double().sum()
        outcome, message = "accepted", ""
    except CheckpointError as error:
        outcome, message = "CheckpointError", str(error)
    assert len(message) <= 2000, "the message is too long"
    assert message.isprintable(), "the message is not printable"
    assert not Path("it-ran").exists(), "code of a file ran"
    return outcome


def _damage(random_: random.Random, ckpt: Path) -> None:
    plain = [path for path in sorted(ckpt.rglob("*")) if files.is_plain(path)]
    if not plain:
        return
    path = random_.choice(plain)
    if path.suffix == ".json" and random_.random() < 0.8:
        damage = texts.json_file
    elif path.suffix in (".bin", ".pt", ".pkl", ".ckpt") and random_.random() < 0.6:
        damage = random_.choice((bytes_of.pickle_in, bytes_of.record_of, bytes_of.hostile_pickle))
    elif path.suffix == ".safetensors" and random_.random() < 0.6:
        damage = texts.header_of
    else:
        damage = random_.choice((bytes_of.anything, files.replace))
    with contextlib.suppress(Exception):  # what an earlier damage left may be unreadable for this one
        damage(random_, path)
