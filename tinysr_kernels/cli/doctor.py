"""`tinysr doctor`: what this machine can do, what is missing for full speed, and whether the kernels are right here.

Each line: a state, a fact, and the remedy where there is one. `failed` is what should work here and does not: the CPU's
own picture, and with a GPU all that its kernels need. Only that gives exit code 1. The output holds no private data:
the home folder is written as ~.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tinysr_kernels.cli.terminal import printable, put, say

OK, WARNING, MISSING, FAILED = "ok", "warning", "missing", "failed"
DRIFT = 1e-4
"""Difference between the demo's pictures in float32 and float64 that is allowed; of [0, 1], as all below."""
ROUNDING = 5e-3
"""Root mean square of the difference between a GPU's picture in 16 bits and that in float64; 1.2e-3 in bfloat16."""
UNLIKE = 0.02
"""Mean difference between the input and its enlargement, averaged over 4x4 pixels; the demo's is 0.005."""
SIDE = 48
_REPORT = "please report it with this output"


@dataclass(frozen=True)
class Finding:
    """One line: a state, what it is about, the fact, and what to do about it, if anything."""

    state: str
    name: str
    fact: str
    remedy: str = ""


def add_parser(commands: Any) -> None:
    """Add the subcommand to argparse's subparsers."""
    parser = commands.add_parser("doctor", help="check this machine: what it can do, what is missing, the kernels")
    parser.add_argument("checkpoint", metavar="CKPT", nargs="?", help="check this model's kernels too")
    parser.add_argument("--device", help="the device to check; by default the first GPU, else the CPU")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is found, as it is found. 1 if something that should work does not, else 0."""
    from tinysr_kernels.runtime.environment import without_home

    if not arguments.json:
        say("tinysr: doctor looks at this machine; checking kernels may take some minutes")
    found = []
    for one in examine(arguments.checkpoint, arguments.device):
        one = Finding(one.state, one.name, without_home(printable(one.fact)), without_home(printable(one.remedy)))
        found.append(one)
        if not arguments.json:
            _print(f"{one.state:<8} {one.name:<16} {one.fact}")
            if one.remedy:
                _print(f"{'':<8} {'':<16} -> {one.remedy}")
    works = all(one.state != FAILED for one in found)
    if arguments.json:
        _print(json.dumps({"works": works, "findings": [asdict(one) for one in found]}))
    return 0 if works else 1


def _print(line: str) -> None:
    if not put(line):
        raise OSError("the output could not be written")


def examine(checkpoint: str | None, device: str | None) -> Iterator[Finding]:
    """Everything, cheap facts first. CheckpointError or InputError for arguments that cannot be used."""
    from tinysr_kernels.launch.backend import obstacle as kernels_obstacle
    from tinysr_kernels.runtime.device.choose import choose_device
    from tinysr_kernels.runtime.environment import environment

    facts = environment()
    for name in ("tinysr-kernels", "system", "processor", "free memory", "python"):
        yield Finding(OK, name, str(facts[name]))
    yield Finding(OK, "torch", f"{facts['torch']}, CUDA {facts['cuda']}")
    yield from _gpus(facts)
    chosen = choose_device(device)
    obstacle = kernels_obstacle(chosen)
    yield from _needs(chosen, FAILED if chosen.type == "cuda" and not obstacle else MISSING)
    yield _backend(chosen, obstacle)
    yield from _extras()
    for one in ("demo", checkpoint):
        if one is not None:
            yield from _model(one, chosen, obstacle)


def _gpus(facts: dict[str, Any]) -> Iterator[Finding]:
    """The GPUs that torch sees, or why it sees none."""
    from tinysr_kernels.first_use.machine import has_nvidia_driver

    gpus = [str(fact) for name, fact in facts.items() if name.startswith("gpu ")]
    for gpu in gpus:
        yield Finding(OK, "GPU", gpu)
    if gpus:
        yield Finding(OK, "driver", str(facts.get("driver", "unknown")))
    elif os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield Finding(OK, "GPU", "none: CUDA_VISIBLE_DEVICES hides them; this machine computes on the CPU")
    elif not has_nvidia_driver():
        yield Finding(MISSING, "GPU", "none from NVIDIA: this machine computes on the CPU, which is slow")
    elif str(facts["cuda"]).startswith("none"):
        remedy = "install torch with CUDA: pytorch.org/get-started/locally"
        yield Finding(FAILED, "GPU", "NVIDIA's driver is here, but this torch is built for the CPU alone", remedy)
    else:
        remedy = f"update the driver to one for CUDA {facts['cuda']} or later; in a container, start it with its GPUs"
        yield Finding(FAILED, "GPU", "NVIDIA's driver is here, but torch finds no GPU that it can use", remedy)


def _needs(device: Any, lacking: str) -> Iterator[Finding]:
    """What kernels need besides PyTorch, and the launch configurations for this GPU."""
    from tinysr_kernels.first_use import machine
    from tinysr_kernels.first_use.verdicts import folder
    from tinysr_kernels.versions import installed

    here, wanted = installed("triton"), machine.triton_of_torch()
    if here == "none":
        yield Finding(lacking, "Triton", "not installed", f"pip install triton{f'=={wanted}' if wanted else ''}")
    elif wanted and here != wanted:
        remedy = f"pip install triton=={wanted}"
        yield Finding(WARNING, "Triton", f"{here}, but this torch was built for {wanted}", remedy)
    else:
        yield Finding(OK, "Triton", here)
    package = "apt-get install gcc python3-dev (Debian, Ubuntu), or their like"
    compiler, headers, ptxas = machine.c_compiler(), machine.python_headers(), machine.ptxas()
    inside = "inside Triton" if "TRITON_PTXAS_PATH" not in os.environ else ptxas
    yield Finding(OK, "C compiler", compiler) if compiler else Finding(lacking, "C compiler", "none found", package)
    yield Finding(OK, "Python.h", headers) if headers else Finding(lacking, "Python.h", "none found", package)
    yield Finding(OK, "ptxas", inside) if ptxas else Finding(lacking, "ptxas", "none found", "pip install triton again")
    for name, path, variable, state in (
        ("Triton's cache", machine.triton_cache(), "TRITON_CACHE_DIR", lacking),
        ("verdicts", folder() / "self-check", "TINYSR_CACHE_DIR", WARNING),
    ):
        obstacle = machine.obstacle_to_writing(path)
        remedy = f"make it writable, or name another folder in {variable}"
        yield Finding(state, name, f"{path}: {obstacle}", remedy) if obstacle else Finding(OK, name, str(path))
    if device.type == "cuda":
        yield _configurations(device)


def _configurations(device: Any) -> Finding:
    from tinysr_kernels.launch import configs
    from tinysr_kernels.launch.device import gpu_at

    name = gpu_at(device).name
    files = (configs.user_file(name), configs.BUNDLED / configs.file_name(name))
    found = [str(path) for path in files if path.is_file()]
    return Finding(OK, "configurations", found[0] if found else "none measured on this GPU: the heuristics choose")


def _backend(device: Any, obstacle: str) -> Finding:
    """What `compile` would pick, and why."""
    from tinysr_kernels.launch.backend import choose_backend

    chosen = choose_backend("auto", device)
    if not obstacle or device.type == "cpu":
        return Finding(OK, "backend", f"{chosen} on {device}")
    return Finding(WARNING, "backend", f"{chosen} on {device}: {obstacle}")


def _extras() -> Iterator[Finding]:
    """What reads films and HEIF files."""
    import importlib.util

    for name, module, extra in (("films", "av", "video"), ("HEIF, AVIF", "pillow_heif", "heif")):
        if importlib.util.find_spec(module) is not None:
            yield Finding(OK, name, f"{module} is installed")
        else:
            remedy = f"pip install 'tinysr-kernels[{extra}]'"
            yield Finding(MISSING, name, f"{module} is not installed; only they need it", remedy)


def _model(checkpoint: str, device: Any, obstacle: str) -> Iterator[Finding]:
    """A model's kernels, CUDA graphs and picture on the device."""
    import tinysr_kernels
    from tinysr_kernels.errors import CheckpointError, InputError, TinySRError
    from tinysr_kernels.first_use import self_check

    name = "demo" if checkpoint == "demo" else "model"
    try:
        with self_check.postponed():
            model = tinysr_kernels.compile(checkpoint, device=device)
        if self_check.applies(device) and not obstacle:
            yield from _kernels(self_check.check((call.operator for call in model.launches), device, again=True), name)
        picture = _picture()
        enlarged = model(picture)
        model(picture)  # once more: what follows is replayed from a CUDA graph, if there are any
        if device.type == "cuda":
            yield _graphs(model.info(), name)
        yield _faithful(picture, enlarged.cpu(), name)
        if checkpoint == "demo":
            yield _exact(picture, enlarged.cpu(), device)
    except (CheckpointError, InputError):
        raise
    except (TinySRError, RuntimeError, OSError) as error:
        yield Finding(FAILED, f"{name}: picture", f"{type(error).__name__}: {error}", _REPORT)


def _kernels(found: Any, name: str) -> Iterator[Finding]:
    """The self-check's verdicts."""
    name = f"{name}: kernels"
    if found.general:
        yield Finding(FAILED, name, f"none can be used: {found.general}")
        return
    for one in found.barred:
        yield Finding(FAILED, name, f"{one}; PyTorch computes instead, slower", _REPORT)
    count = Counter(one.kind for one in found.verdicts)
    fact = f"{count['passed']} of {len(found.verdicts)} launches agree with the references"
    if found.obstacle:
        yield Finding(WARNING, name, f"{fact}; not all could be checked: {found.obstacle}")
    else:
        yield Finding(OK if count["passed"] == len(found.verdicts) else WARNING, name, fact)


def _graphs(info: dict[str, Any], name: str) -> Finding:
    works = info["graph_captures"] > 0 and not info["graph_fallbacks"]
    fact = f"{info['graph_captures']} captured, {info['graph_fallbacks']} failed"
    return Finding(OK if works else WARNING, f"{name}: CUDA graphs", fact, "" if works else _REPORT)


def _picture() -> Any:
    """Two gradients and a disk, [3,48,48] float32 in [0,1]."""
    import torch

    rows = torch.linspace(0, 1, SIDE, dtype=torch.float32, device="cpu")[:, None].expand(SIDE, SIDE)
    disk = ((rows - 0.5).square() + (rows.T - 0.5).square() < 0.1).float()
    return torch.stack([0.2 + 0.6 * rows, 0.2 + 0.6 * rows.T, 0.3 + 0.4 * disk])


def _faithful(picture: Any, enlarged: Any, name: str) -> Finding:
    """Whether an enlargement looks like what it was made from."""
    import torch.nn.functional as F

    unlike = float((F.interpolate(enlarged.double()[None], size=(SIDE, SIDE), mode="area")[0] - picture).abs().mean())
    fact = f"{SIDE}x{SIDE} enlarged; reduced again it differs by {unlike:.2g} on average"
    # Of an unknown checkpoint nothing is known but that its picture consists of numbers.
    wrong = not unlike < (UNLIKE if name == "demo" else 1.0)
    return Finding(FAILED if wrong else OK, f"{name}: picture", fact, _REPORT if wrong else "")


def _exact(picture: Any, enlarged: Any, device: Any) -> Finding:
    """Whether the demo's picture is that of the CPU in float64."""
    import tinysr_kernels

    exact = tinysr_kernels.compile("demo", device="cpu", dtype="float64", backend="reference")(picture.double())
    difference = (enlarged.double() - exact).abs()
    most, typical = float(difference.max()), float(difference.square().mean().sqrt())
    wrong = not (typical <= ROUNDING if device.type == "cuda" else most <= DRIFT)
    fact = f"differs from float64 by {most:.2g} at most"
    return Finding(FAILED if wrong else OK, "demo: numbers", fact, _REPORT if wrong else "")
