"""Things in memory handed to `compile`, files of ours with other numbers and tensors, and odd keywords.

Each case takes a sound checkpoint (dict of parts, module, own or folded file) and changes up to three things of it, or
hands over something odd in its place. What compiles is sometimes saved, loaded and run.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import tinysr_kernels
from tests.fuzz.odd import NUMBERS, odd_object, odd_tensor
from tests.layouts.adcsr import HALF_DECODER, NET, write_adcsr
from tests.layouts.tinysr import STEM, TRANSFORMER, VAE, write_tinysr
from tests.layouts.unet import write_unet
from tinysr_kernels.checkpoint.own.manifest import manifest
from tinysr_kernels.cli.main import main
from tinysr_kernels.families import TinySRConfig, UNetConfig

KEYWORDS: dict[str, tuple[Any, ...]] = {
    "device": ("cpu", "cuda:99", "cpu:3", "tpu", "", -1, True, torch.device("meta"), 10**30),
    "dtype": ("float16", "bfloat16", "float64", torch.float16, torch.int8, "float8", int, torch.complex64),
    "backend": ("auto", "reference", "library", "triton", "", None),
    "quantize": ("fp8", "int4", True, ["fp8"]),
    "cuda_graphs": (True, False, None, 1, "yes"),
    "color_fix": ("adain", "wavelet", "none", "", []),
    "upscale": (4, 2, 3, 1, 0, -4, "4", 4.0, True, 10**9),
    "embeddings": (None, torch.ones(1, 48), {"pool_embeds": torch.ones(1, 48)}),
    "max_graph_shapes": (1, 8, 0, -1, 2.5, 10**9),
    "tile": (16, 64, 15, -1, 1e9, 10**9, "64"),
}


class Held(nn.Module):
    """A module that holds these tensors under these names, and a `config`."""

    def __init__(self, tensors: dict[str, Any], config: Any) -> None:
        super().__init__()
        self.tensors, self.config = tensors, config

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        return self.tensors


@cache
def _folder() -> Path:
    folder = Path(mkdtemp(prefix="fuzz-objects-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    config = TinySRConfig(head_dim=32, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1, 1))
    write_tinysr(folder / "tinysr", config=config, dim=32, layers=1, table=8, pooled_dim=48, channels=4, vae_width=4)
    write_adcsr(folder / "adcsr", channels=(48, 48), layers=1, decoder_channels=(8, 8, 8, 8))
    write_unet(folder / "own.safetensors", channels=(4, 8), decoder_channels=(4, 4, 4, 4))
    for name in ("tinysr", "own.safetensors"):
        tinysr_kernels.compile(folder / name, device="cpu").save(folder / f"{Path(name).stem}-folded.safetensors")
    return folder


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def setup() -> None:
    """Write the sound checkpoints, and silence what compiling says."""
    _folder()
    torch.set_num_threads(1)


def _changed(draw: random.Random, tensors: dict[str, Any]) -> dict[str, Any]:
    """Up to three tensors changed, taken away or added."""
    made = dict(tensors)
    for _ in range(draw.choice((0, 0, 0, 0, 1, 1, 2, 3))):
        name = draw.choice(sorted(made, key=str))
        way = draw.random()
        if way < 0.15:
            del made[name]
        elif way < 0.25:
            key: Any = draw.choice((3, None, f"{name}.more", name.replace("weight", "bias"), "\x1b[2J", "x" * 5000))
            made[key] = torch.ones(2)
        elif type(made[name]) is Tensor and not made[name].is_nested:
            made[name] = odd_tensor(draw, made[name])
        if not all(isinstance(key, str) for key in made):
            break
    return made


def _config(draw: random.Random, values: dict[str, Any]) -> dict[str, Any]:
    """Up to two values of a configuration changed."""
    made = dict(values)
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        made[draw.choice([*made, "unknown"])] = draw.choice(NUMBERS)
    return made


def _tinysr(draw: random.Random) -> Any:
    folder = _folder() / "tinysr"
    parts: dict[str, Any] = {}
    for name, place in (("transformer", TRANSFORMER), ("vae", VAE)):
        tensors = _changed(draw, _read(folder / place / f"{STEM}.safetensors")[0])
        values = _config(draw, json.loads((folder / place / "config.json").read_text()))
        parts[name] = Held(tensors, values) if draw.random() < 0.7 else tensors
    pooled = torch.load(folder / "dataset/default/pool_embeds.pt", weights_only=True)
    parts["embeddings"] = odd_tensor(draw, pooled) if draw.random() < 0.2 else pooled
    if draw.random() < 0.1:
        parts[draw.choice([*parts, "lora", "more"])] = odd_object(draw)
    return parts


def _adcsr(draw: random.Random) -> Any:
    folder = _folder() / "adcsr"
    net = torch.load(folder / NET, weights_only=True)
    decoder = torch.load(folder / HALF_DECODER, weights_only=True)["state_dict"]
    return {"unet": _changed(draw, net), "decoder": _changed(draw, decoder)}


def _module(draw: random.Random) -> Any:
    tensors, metadata = _read(_folder() / "own.safetensors")
    values = json.loads(metadata["config"])
    changed = _config(draw, values) if draw.random() < 0.5 else values
    changed.pop("unknown", None)
    return Held(_changed(draw, tensors), odd_object(draw) if draw.random() < 0.1 else UNetConfig(**changed))


def _file(draw: random.Random, folder: Path) -> Any:
    """A file of ours with other tensors, or other metadata; a folded one's list is sometimes made to fit."""
    name = draw.choice(("own", "own-folded", "tinysr-folded"))
    tensors, metadata = _read(_folder() / f"{name}.safetensors")
    made = {key: t for key, t in _changed(draw, tensors).items() if isinstance(key, str) and _can_be_stored(t)}
    made = {key: Tensor.detach(t).clone().contiguous() for key, t in made.items()}
    if draw.random() < 0.5:
        metadata["config"] = json.dumps(_config(draw, json.loads(metadata["config"])))
    if "tensors" in metadata and draw.random() < 0.6:
        metadata["tensors"] = manifest(made)
    if draw.random() < 0.2:
        key = draw.choice(sorted(metadata))
        metadata[key] = draw.choice(("", "0", "1", "2", "x" * 100_000, "[" * 100_000, "{}", "float16", "\x1b[2J"))
    save_file(made, folder / "made.safetensors", metadata)
    return folder / "made.safetensors"


def _can_be_stored(value: Any) -> bool:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta
    if not plain or value.is_nested or value.is_quantized or value.is_complex() or value.is_neg():
        return False
    return value.numel() < 10**6 and value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _keywords(draw: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {"device": "cpu"}
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        name = draw.choice(sorted(KEYWORDS))
        made[name] = odd_object(draw) if draw.random() < 0.2 else draw.choice(KEYWORDS[name])
    return made


def case(seed: int, folder: Path) -> str:
    """Compile something, or run `info` or `convert` on a file: a model or an error of ours."""
    with contextlib.chdir(folder):  # odd targets may be relative paths
        return _case(random.Random(seed), folder)


def _case(draw: random.Random, folder: Path) -> str:
    made: tuple[Callable[[], Any], ...] = (
        lambda: _tinysr(draw),
        lambda: _adcsr(draw),
        lambda: _module(draw),
        lambda: _file(draw, folder),
        lambda: _file(draw, folder),
        lambda: odd_object(draw),
    )
    ckpt = draw.choice(made)()
    if issubclass(type(ckpt), Path) and draw.random() < 0.2:
        return _command(draw, ckpt, folder)
    try:
        model = tinysr_kernels.compile(ckpt, **_keywords(draw))
        if draw.random() < 0.2:
            target = odd_object(draw) if draw.random() < 0.3 else folder / "saved.safetensors"
            model.save(target)
            tinysr_kernels.compile(target, device="cpu")(torch.rand(3, 9, 7))
    except tinysr_kernels.TinySRError as error:
        return type(error).__name__
    return "accepted"


def _command(draw: random.Random, ckpt: Path, folder: Path) -> str:
    """`info`, or `convert` to a target of some kind; the checkpoint itself stays as it is, byte for byte."""
    before = ckpt.read_bytes()
    (folder / "link.safetensors").symlink_to(draw.choice((ckpt, folder / "nowhere", folder / "link.safetensors")))
    (folder / "hard.safetensors").hardlink_to(ckpt)
    targets = ("", "-", ".", str(folder), str(ckpt), "/dev/full", "made.safetensors/x.safetensors", "x" * 300)
    names = ("out.safetensors", "out", "link.safetensors", "hard.safetensors", "no/out.safetensors", "画" * 80)
    target = draw.choice((*targets, *(str(folder / name) for name in names), str(folder / "out.safetensors")))
    options = ["--force"] if draw.random() < 0.5 else []
    command = ["info", str(ckpt)] if draw.random() < 0.3 else ["convert", str(ckpt), target, *options]
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(errors):
        code = main(command)
    assert ckpt.read_bytes() == before
    text = (output.getvalue() + errors.getvalue()).replace("\n", "")
    assert text.isprintable(), text
    assert code in (0, 2), code
    return "accepted" if code == 0 else "usage"
