"""`python -m benchmarks e2e`: whole models, compared with the public structure in PyTorch and with the teachers.

Every family at full size with random weights (the demo: its own). Intervals: "device", from the uint8 image on the
device to the enlarged one there; "host", from a numpy image to a numpy image. Peers of one family are measured in one
process, interleaved. torch.compile runs last; what does not finish in time is recorded as such. Without a GPU: small
networks and images.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.commands.ceilings import physical
from benchmarks.measure.results import Record, Results
from benchmarks.measure.session import Session, session
from benchmarks.measure.session import add_arguments as add_common
from benchmarks.measure.timing import Work, graphed, record
from benchmarks.subjects import peers
from benchmarks.subjects.families import SUBJECTS
from benchmarks.subjects.models import Model, image, model
from benchmarks.subjects.networks import VARIANTS
from benchmarks.subjects.teachers import NAMES, teacher
from tinysr_kernels.families import FAMILIES
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import gpu_of
from tinysr_kernels.runtime.arguments import DTYPES
from tinysr_kernels.runtime.compiled import CompiledSR

SUMMARY = "Whole models against eager PyTorch, torch.compile and the teachers: latency, batches, a 4K frame, memory."
SAMPLES = 20
BATCHES = (2, 4, 8, 16)
SIDE, FRAME = 128, (540, 960)
SMALL_SIDE, SMALL_FRAME = 32, (48, 64)
Make = Callable[[], Work]


@dataclass
class Subject:
    """A measured family: its random checkpoint and the compiled models."""

    made: Session
    model: Model
    ours: CompiledSR
    dtype: str

    @property
    def side(self) -> int:
        """Side of the image in pixels."""
        return SIDE if self.made.cuda else SMALL_SIDE

    def image(self, batch: int = 1, size: tuple[int, int] | None = None) -> Tensor:
        """A uint8 image batch on the device."""
        return image(*(size or (self.side, self.side)), batch, device=self.made.device)

    def labels(self, peer: str, shape: torch.Size, interval: str) -> dict[str, str]:
        """The labels of its records."""
        one = self.model
        dtype = "float8_e4m3" if peer == "ours, fp8" else self.dtype
        names = {"family": one.family, "variant": one.variant, "dtype": dtype, "peer": peer, "interval": interval}
        return names | {"batch": str(shape[0]), "size": f"{shape[2]}x{shape[3]}"}

    def floor_us(self, batch: int, quantized: bool = False) -> float:
        """Lower bound of any implementation: all FLOPs at the peak rate, or all weights once from DRAM."""
        limits = physical(self.made)
        if limits is None or self.side != SIDE:
            return 0.0
        peak = limits.fp32 if self.dtype == "float32" else limits.fp8 if quantized else limits.fp16
        flops = batch * sum(call.cost.flops for call in self.ours.launches)
        weights = sum(t.nbytes for t in self.ours.network.buffers()) * (0.5 if quantized else 1)
        # Some may still be in the L2 from the image before.
        weights = max(weights - torch.cuda.get_device_properties(self.made.device).L2_cache_size, 0)
        return 1e6 * max(flops / peak, weights / limits.memory)


def key_of(labels: Mapping[str, str]) -> str:
    """Identifies a record."""
    where = f"{labels['batch']} x {labels['size']} {labels['interval']}"
    return f"{labels['family']} {labels['variant']} {labels['dtype']} {where}: {labels['peer']}"


def interleaved(
    subject: Subject,
    shape: torch.Size,
    interval: str,
    makers: Mapping[str, Make],
    *,
    seconds: float = float("inf"),
    against: str = "",
) -> None:
    """Measure several peers on images of this shape; failures and time-outs are recorded as such.

    against: one of them whose latency stands beside the others' and which gets no record itself.
    """
    made, works, peaks = subject.made, dict[str, Work](), dict[str, float]()
    for name, make in makers.items():
        labels = subject.labels(name, shape, interval)
        with made.guarded(key_of(labels), labels), peers.limited(min(seconds, made.left())):
            before = _memory(made)
            works[name] = make()
            works[name].run()
            made.stopwatch.synchronize()
            if made.cuda:
                peaks[name] = (torch.cuda.max_memory_allocated(made.device) - before) / 2**20
    measured = made.stopwatch.interleaved(works, SAMPLES if made.cuda else 3, made.until)
    for name, several in measured.items():
        labels = subject.labels(name, shape, interval)
        values = {"peak_mib": round(peaks[name], 1)} if name in peaks else {}
        one = record(key_of(labels), labels, several, works[name], **values)
        if against and against in measured:
            one.values["beside_p50_us"] = record("", {}, measured[against]).values["p50_us"]
        if name != against:
            made.sink.add(one)
    works.clear()
    made.release()


def _memory(made: Session) -> float:
    if not made.cuda:
        return 0.0
    torch.cuda.reset_peak_memory_stats(made.device)
    return torch.cuda.memory_allocated(made.device)


def _peer(subject: Subject, name: str, x: Tensor) -> Work:
    return peers.work_of(name, peers.peer(name, subject.model, subject.dtype), x)


def latency(subject: Subject) -> None:
    """One image on the device: ours and everything that needs no compiler."""
    x, one = subject.image(), subject.model

    def device() -> Work:
        work = peers.ours_on_device(subject.ours, x)
        work.floor_us = subject.floor_us(1)
        return work

    makers: dict[str, Make] = {"ours": device}
    for name in peers.PEERS:
        lora = name == "eager, LoRA unmerged" and SUBJECTS[one.family].lora is None
        graph = name.endswith("CUDA graph") and not subject.made.cuda
        if not (lora or graph or name.startswith("torch.compile")):
            makers[name] = functools.partial(_peer, subject, name, x)
    interleaved(subject, x.shape, "device", makers)
    interleaved(
        subject,
        x.shape,
        "host",
        {
            "ours": lambda: peers.ours_from_host(subject.ours, x),
            "eager": lambda: peers.host_work(peers.peer("eager", one, subject.dtype), x),
        },
    )


def quantized(subject: Subject) -> None:
    """Ours in fp8, where the family and the card have it."""
    x = subject.image()

    def make() -> Work:
        fast = subject.model.compiled(subject.dtype, quantize="fp8")
        work = peers.ours_on_device(fast, x)
        work.floor_us = subject.floor_us(1, quantized=True)
        return work

    ours = functools.partial(peers.ours_on_device, subject.ours, x)
    interleaved(subject, x.shape, "device", {"ours": ours, "ours, fp8": make}, against="ours")


def early(subject: Subject) -> None:
    """Ours with and without programmatic dependent launch, whatever the configuration file says."""
    x = subject.image()
    if not subject.made.cuda or gpu_of(x).capability < configs.PDL_CAPABILITY:
        return

    def make(on: bool) -> Work:
        with configs.given_pdl(on):
            return peers.ours_on_device(subject.model.compiled(subject.dtype), x)

    makers = {f"ours, {name} PDL": functools.partial(make, on) for name, on in (("with", True), ("without", False))}
    interleaved(subject, x.shape, "device", makers)


def parts(subject: Subject) -> None:
    """Where our time goes: each part of the network alone, on its real input."""
    x = subject.image()
    given: dict[str, tuple[Any, ...]] = {}
    plain = subject.model.compiled(subject.dtype, graphs=0) if subject.made.cuda else subject.ours
    children = dict(plain.network.named_children())
    with contextlib.ExitStack() as stack:
        for name, child in children.items():
            stack.callback(child.register_forward_pre_hook(_keeping(given, name)).remove)
        plain.enlarge(x)
    works = {}
    with using(plain.backend):
        for name, child in children.items():
            if name in given:
                run = functools.partial(child, *given[name])
                works[name] = graphed([run], 1) if subject.made.cuda else Work(run)
        measured = subject.made.stopwatch.interleaved(works, SAMPLES if subject.made.cuda else 3, subject.made.until)
    for name, several in measured.items():
        labels = subject.labels("ours", x.shape, f"part {name}")
        subject.made.sink.add(record(key_of(labels), labels, several))


def _keeping(given: dict[str, tuple[Any, ...]], name: str) -> Callable[..., None]:
    def hook(_: Any, arguments: tuple[Any, ...]) -> None:
        given.setdefault(name, arguments)

    return hook


def batches(subject: Subject) -> None:
    """Throughput: batches on the device, and a frame for 4K from host to host, tiled if it does not fit."""
    one = subject.model
    eager = peers.peer("eager", one, subject.dtype)
    for batch in BATCHES if subject.made.cuda else BATCHES[:1]:
        x = subject.image(batch)
        makers: dict[str, Make] = {
            "ours": functools.partial(peers.ours_on_device, subject.ours, x),
            "eager": functools.partial(peers.work_of, "eager", eager, x),
        }
        interleaved(subject, x.shape, "device", makers)
    frame = subject.image(1, FRAME if subject.made.cuda else SMALL_FRAME)
    makers = {
        "ours": lambda: peers.ours_from_host(subject.ours, frame),
        "eager": lambda: peers.host_work(eager, frame),
    }
    interleaved(subject, frame.shape, "host", makers)


def compiled(subject: Subject, name: str, seconds: float) -> None:
    """torch.compile in one of its modes, beside ours."""
    x = subject.image()
    makers: dict[str, Make] = {
        "ours": functools.partial(peers.ours_on_device, subject.ours, x),
        name: functools.partial(_peer, subject, name, x),
    }
    interleaved(subject, x.shape, "device", makers, seconds=seconds, against="ours")


def teachers(subject: Subject) -> None:
    """TSD-SR and OSEDiff in eager half precision, beside ours."""
    x, dtype = subject.image(), torch.float16 if subject.made.cuda else torch.float32

    def make(name: str) -> Work:
        network = teacher(name, subject.made.device, dtype, reduced=not subject.made.cuda)
        return peers.work_of("eager", peers.step_of(network, dtype), x)

    for name in NAMES:
        makers = {"ours": functools.partial(peers.ours_on_device, subject.ours, x), name: functools.partial(make, name)}
        interleaved(subject, x.shape, "device", makers, against="ours")


def _subjects(made: Session, families: tuple[str, ...]) -> Iterator[Subject]:
    for family in families:
        variant = VARIANTS[family][0]
        with made.guarded(f"{family} {variant}: compile", {"family": family, "variant": variant}):
            one = model(family, variant, made.device, reduced=not made.cuda)
            dtype = one.own_dtype if one.own_dtype in DTYPES else "float32"
            yield Subject(made, one, one.compiled(dtype), dtype)


@torch.inference_mode()
def measure(made: Session, families: tuple[str, ...] = tuple(SUBJECTS), compile_too: bool = True) -> None:
    """Everything, in order of importance. Subjects that fail to compile are recorded and skipped."""
    subjects = list(_subjects(made, families))
    steps: list[tuple[str, Callable[[Subject], None]]] = [
        ("latency", latency),
        ("PDL", early),
        ("parts", parts),
        ("fp8", quantized),
    ]
    for subject in subjects:
        for what, step in steps:
            if what != "fp8" or what in FAMILIES[subject.model.family].quantizations:
                _unless_done(subject, what, step)
    for subject in subjects:
        if SUBJECTS[subject.model.family].teachers:
            _unless_done(subject, "teachers", teachers)
    modes = [name for name in peers.PEERS if name.startswith("torch.compile")] if compile_too else []
    for i, name in enumerate(modes):
        for subject in subjects:
            # Half of the remaining time for each, so that some remains for later steps.
            share = made.left() / (2 if i == 0 else 1.5)
            _unless_done(subject, name, functools.partial(compiled, name=name, seconds=share))
    for subject in subjects:
        _unless_done(subject, "batches", batches)


def _unless_done(subject: Subject, what: str, step: Callable[[Subject], None]) -> None:
    """One step, unless an earlier run has finished it, which its own record marks."""
    one = subject.model
    labels = {"family": one.family, "variant": one.variant, "step": what}
    key = f"{one.family} {one.variant}: {what} done"
    if subject.made.sink.has(key):
        return
    with subject.made.guarded(key, labels):
        subject.made.need(1)
        step(subject)
        subject.made.sink.add(Record(key, labels, values={"done": 1.0}))


def table(results: Results) -> list[str]:
    """One line per measurement."""
    lines = [f"{'':<90} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'MiB':>8}"]
    for one in results.records:
        if one.error:
            lines.append(f"{one.key:<90} {one.error[:120]}")
        elif one.samples_us:
            times = " ".join(f"{one.values[p] / 1e3:>9.3f}" for p in ("p50_us", "p20_us", "p80_us"))
            lines.append(f"{one.key:<90} {times} {one.values.get('peak_mib', 0):>8.0f}")
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_common(parser)
    parser.add_argument("--family", action="append", choices=SUBJECTS, help="this one alone (repeatable; all)")
    parser.add_argument("--compile", action="store_true", help="torch.compile also on a CPU, where it takes minutes")


def main(options: argparse.Namespace) -> int:
    """Measure and print."""
    with session("e2e", options) as made:
        measure(made, tuple(options.family or SUBJECTS), made.cuda or options.compile)
    for line in table(made.sink.results):
        print(line)
    return 0
