"""The side of a GPU that touches it, in the worker's process: checks and times configurations.

Times are those of CUDA graph replays in which many calls follow each other, on inputs that take turns so that together
they exceed the L2 twice, between two events; launch overhead of the host is in none of them.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autotune.device.correctness import Truth, truths, verdict
from autotune.device.worker import Broken
from autotune.items.answers import Failure, Sample
from autotune.items.work import Item, Target, model_of
from benchmarks.measure.nvml import Monitor
from benchmarks.measure.timing import READING_MS, captured, rotation
from benchmarks.subjects.inputs import draw_inputs, drawn
from tinysr_kernels.families import Checkpoint
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.plan import Plan
from tinysr_kernels.ops import Operator
from tinysr_kernels.runtime.compiled import CompiledSR

WHOLE_MS = 40.0
GRAPHS = 12
"""Candidates of an item that stay captured: a batch and the champion."""


@dataclass
class Prepared:
    """A captured configuration: replays of `graph` make `calls` calls each. plans: keep its tensors alive."""

    graph: torch.cuda.CUDAGraph
    calls: int
    replays: int
    plans: list[Plan]


class Bench:
    """One GPU. Made in the worker's process; methods raise `Broken` where CUDA's context is lost."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self.properties = torch.cuda.get_device_properties(self.device)
        torch.zeros(1, device=self.device)  # the context, before NVML lists who has one
        self.monitor = Monitor(str(self.properties.uuid))
        self.item = ""
        self.inputs: list[Operator] = []
        self.truths: dict[int, list[Truth]] = {}
        self.prepared: OrderedDict[Any, Prepared] = OrderedDict()
        self.models: OrderedDict[Any, tuple[CompiledSR, torch.Tensor, int]] = OrderedDict()

    def facts(self) -> dict[str, Any]:
        """Name, capability, multiprocessors, what `Monitor.limits` knows, and how busy others keep the GPU."""
        p = self.properties
        known = {"name": p.name, "capability": (p.major, p.minor), "multiprocessors": p.multi_processor_count}
        limits = self.monitor.limits()
        memory_mib = limits["memory_mib"] or p.total_memory >> 20
        return {**known, **limits, "memory_mib": memory_mib, "busy": self.monitor.busy()}

    @torch.inference_mode()
    def check(self, item: Item, config: Any, draw: int) -> Failure | None:
        """Compare with the reference."""

        def compare() -> Failure | None:
            self._turn_to(item)
            if draw not in self.truths:
                self.truths[draw] = truths(item, self.device, draw)
            return verdict(item, config, self.truths[draw])

        return self._guarded(compare)

    @torch.inference_mode()
    def sample(self, item: Item, config: Any, floor_us: float) -> Sample | Failure:
        """One reading. floor_us: what a call takes at least if its inputs come from memory."""

        def read() -> Sample | Failure:
            self._turn_to(item)
            prepared = self._prepare(item, config)
            us, sample = self._time(lambda: _replay(prepared), prepared.calls * prepared.replays)
            rotated = len(self.inputs) * item.cost.bytes >= 2 * self.properties.L2_cache_size
            if rotated and us < floor_us:
                return Failure("impossible", f"{us:.3g} us where {floor_us:.3g} us is the least")
            return sample

        return self._guarded(read)

    @torch.inference_mode()
    def whole(self, target: Target, entries: Mapping[str, Mapping[str, Any]], pdl: bool) -> Sample | Failure:
        """One reading of a whole model, uint8 image to uint8 image on the device, by the graphs it runs with."""

        def read() -> Sample | Failure:
            self._turn_to(None)
            model, image, calls = self._model(target, entries, pdl)
            sample = self._time(lambda: _enlarge(model, image, calls), calls)[1]
            info = model.info()
            if info["non_finite_retries"] or info["graph_fallbacks"]:
                return Failure("error", "random weights overflowed, or no graph could be captured")
            return sample

        return self._guarded(read)

    def _time(self, work: Callable[[], None], calls: int) -> tuple[float, Sample]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before = self.monitor.state()
        start.record()
        work()
        end.record()
        end.synchronize()
        after = self.monitor.state()
        us = 1e3 * start.elapsed_time(end) / calls
        return us, Sample(us, self.monitor.disturbance(before, after), after.clock)

    def _turn_to(self, item: Item | None) -> None:
        """Make room for another item's tensors."""
        key = "" if item is None else item.key
        if key == self.item:
            return
        self.item, self.inputs, self.truths = key, [], {}
        self.prepared.clear()
        if item is not None:
            self.models.clear()
        torch.cuda.empty_cache()

    def _prepare(self, item: Item, config: Any) -> Prepared:
        if config in self.prepared:
            self.prepared.move_to_end(config)
            return self.prepared[config]
        while len(self.prepared) >= GRAPHS:
            self.prepared.popitem(last=False)
        if not self.inputs:
            copies = rotation(item.cost.bytes, self.properties.L2_cache_size)
            self.inputs = [drawn(item.call, self.device, seed) for seed in range(copies)]
        # Results lie ready before the capture, so that each set of inputs has its own, as cold as they are.
        plans = [call.plan(config) for call in self.inputs]
        graph, calls = captured([plan.run for plan in plans])
        prepared = Prepared(graph, calls, 1, plans)
        us, _ = self._time(lambda: _replay(prepared), prepared.calls)
        prepared.replays = max(math.ceil(1e3 * READING_MS / max(us * prepared.calls, 1e-3)), 1)
        self.prepared[config] = prepared
        return prepared

    def _model(
        self, target: Target, entries: Mapping[str, Mapping[str, Any]], pdl: bool
    ) -> tuple[CompiledSR, torch.Tensor, int]:
        """The target's model with random weights, captured with these configurations, an image, and calls a reading."""
        key = target, repr(entries), pdl
        if key not in self.models:
            while len(self.models) >= 2:
                self.models.popitem(last=False)
            with configs.given(**entries), configs.given_pdl(pdl):
                model = self._compile(target)
                model.warmup([(target.batch, *target.size)])
            shape = (target.batch, 3, *target.size)
            image = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
            _enlarge(model, image, 3)
            us, _ = self._time(lambda: _enlarge(model, image, 3), 3)
            self.models[key] = model, image, max(math.ceil(1e3 * WHOLE_MS / us), 3)
        return self.models[key]

    def _compile(self, target: Target) -> CompiledSR:
        shapes = model_of(target)
        folded = draw_inputs({f"weight {k}": t for k, t in shapes._folded.items()}, self.device, 0)
        return CompiledSR(
            Checkpoint(shapes.family, shapes.config, {}, source="random weights"),
            {name.removeprefix("weight "): t for name, t in folded.items()},
            device=self.device,
            dtype=shapes.dtype,
            backend="triton",
            color_fix=shapes.color_fix,
            upscale=shapes.upscale,
            tile=None,
            graphs=8,
        )

    def _guarded(self, action: Callable[[], Any]) -> Any:
        """The action's answer, or the failure that its error means for the candidate."""
        import triton

        try:
            return action()
        except triton.TritonError as error:
            return Failure("error", f"{type(error).__name__}: {error}")
        except RuntimeError as error:
            self.prepared.clear()
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as lost:  # an error that stays with the context
                raise Broken(str(error)) from lost
            return Failure("error", f"{type(error).__name__}: {error}")


def _replay(prepared: Prepared) -> None:
    for _ in range(prepared.replays):
        prepared.graph.replay()


def _enlarge(model: CompiledSR, image: torch.Tensor, times: int) -> None:
    for _ in range(times):
        model.enlarge(image)
