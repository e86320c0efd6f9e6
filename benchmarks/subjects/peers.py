"""The baselines ("peers") of a compiled model: the public structure in PyTorch, run in the ways available to users.

Every peer maps a uint8 image [N,3,H,W] on the device to the upscaled uint8 image, color fix included, as ours does.
TinySR's public script runs with unmerged LoRA: two more GEMMs of rank 64 in every adapted layer.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure.session import Late
from benchmarks.measure.timing import Work, graphed
from benchmarks.subjects.families import SUBJECTS
from benchmarks.subjects.models import Model, Reference
from tinysr_kernels.runtime.arguments import DTYPES
from tinysr_kernels.runtime.compiled import CompiledSR

PEERS = (
    "eager",
    "eager, LoRA unmerged",
    "eager, channels_last",
    "eager in a CUDA graph",
    "torch.compile",
    "torch.compile max-autotune in a CUDA graph",
)
RANK = 64
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
Step = Callable[[Tensor], Tensor]


class Unmerged(nn.Module):
    """A linear layer with its unmerged LoRA: W x + b + B (A x)."""

    def __init__(self, base: nn.Linear, rank: int = RANK) -> None:
        super().__init__()
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False, **like)
        self.up = nn.Linear(rank, base.out_features, bias=False, **like)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * self.scale


def unmerge(network: nn.Module) -> None:
    """Add an unmerged LoRA to every layer of a transformer's blocks that the release adapts."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and any(name.endswith(f".{target}") for target in ADAPTED):
            network.set_submodule(name, Unmerged(module).requires_grad_(False))


def step_of(enlarge: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Step:
    """uint8 to uint8, around a function that upscales images in [0,1] of the dtype."""

    def step(image: Tensor) -> Tensor:
        return enlarge(image.to(dtype) / 255).mul(255).round().to(torch.uint8)

    return step


def peer(name: str, made: Model, dtype: str) -> Step:
    """One of PEERS, without its CUDA graph, which `work_of` captures. ValueError if the family has no such peer."""
    reference = made.reference(DTYPES[dtype])
    if name == "eager, LoRA unmerged":
        adapted = SUBJECTS[made.family].lora
        if adapted is None:
            raise ValueError(f"{made.family} is released without LoRA")
        unmerge(reference.parts[adapted])
    if name == "eager, channels_last":
        _channels_last(reference)
    step = step_of(reference, DTYPES[dtype])
    if name == "torch.compile":
        return torch.compile(step, dynamic=False)
    if name.startswith("torch.compile max-autotune"):
        _channels_last(reference)
        return torch.compile(step, dynamic=False, mode="max-autotune-no-cudagraphs")
    return step


def _channels_last(reference: Reference) -> None:
    for part in reference.parts.values():
        part.to(memory_format=torch.channels_last)


def work_of(name: str, step: Step, image: Tensor) -> Work:
    """The step on this image: launched by the host, or captured in a CUDA graph if the peer's name says so."""
    if name.endswith("in a CUDA graph"):
        return graphed([lambda: step(image)], 1, keep=(step, image))
    return Work(lambda: step(image), keep=(step, image))


def host_work(step: Step, image: Tensor) -> Work:
    """From uint8 image to uint8 image in host memory, timed by the host's clock."""
    host, device = image.cpu(), image.device
    return Work(lambda: step(host.to(device)).cpu(), host=True, keep=(step, image))


def ours_on_device(model: CompiledSR, image: Tensor) -> Work:
    """The compiled model from uint8 to uint8 on the device: replays of its CUDA graph for this shape."""
    for _ in range(3):  # the graph is captured at the second call of a shape
        model.enlarge(image)
    held = list(model._runner.graphs._held.values())
    if held and model._runner.graphs.statistics.replays:
        return Work(held[-1].graph.replay, keep=(model, image))
    return Work(lambda: model.enlarge(image), keep=(model, image))


def ours_from_host(model: CompiledSR, image: Tensor) -> Work:
    """The compiled model as users call it: numpy images [N,H,W,3] in and out."""
    images: Any = image.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return Work(lambda: model(images), host=True, keep=(model, images))


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Within, `Late` is raised in the main thread after `seconds`; never on Windows, which has no such signal."""

    def stop(*_: Any) -> None:
        raise Late(f"took longer than the remaining {seconds:.0f} s")

    if seconds == float("inf") or sys.platform == "win32":
        yield
        return
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
