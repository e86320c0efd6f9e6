"""Runs in the worker process that owns the GPU: checks and times configurations.

Timings are taken with CUDA events around replays of a CUDA graph. The graph holds many consecutive calls on rotating
inputs that together exceed twice the L2 cache, so inputs are cold and host launch overhead is excluded.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from autotune.device.worker import StickyError
from autotune.items.results import Failure, Sample
from autotune.items.work import Item, Target, model_of
from benchmarks.measure.nvml import Monitor
from benchmarks.measure.timing import READING_MS, captured, rotation
from tinysr_kernels.families import Checkpoint
from tinysr_kernels.first_use.correctness import Expected, check_results, expected_results
from tinysr_kernels.first_use.inputs import random_call, random_inputs
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.plan import Plan
from tinysr_kernels.ops import Operator
from tinysr_kernels.runtime.compiled import CompiledSR

MODEL_MS = 40.0
GRAPHS = 12
"""Candidates of an item whose graphs are kept: a batch and the champion, with some to spare."""


@dataclass
class CapturedConfig:
    """A configuration captured in a CUDA graph of `calls` calls. plans: keep its tensors alive."""

    graph: torch.cuda.CUDAGraph
    calls: int
    replays: int
    plans: list[Plan]


class GpuRunner:
    """One GPU, in the worker process. Methods raise `StickyError` after a CUDA error that corrupts the context."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        self.properties = torch.cuda.get_device_properties(self.device)
        torch.zeros(1, device=self.device)  # creates the context, see Monitor
        self.monitor = Monitor(str(self.properties.uuid))
        self.item = ""
        self.inputs: list[Operator] = []
        self.expected: dict[int, list[Expected]] = {}
        self.captured: OrderedDict[Any, CapturedConfig] = OrderedDict()
        self.models: OrderedDict[Any, tuple[CompiledSR, torch.Tensor, int]] = OrderedDict()

    def facts(self) -> dict[str, Any]:
        """Name, capability, multiprocessors, the values of `Monitor.limits`, and the utilization by other processes."""
        p = self.properties
        known = {"name": p.name, "capability": (p.major, p.minor), "multiprocessors": p.multi_processor_count}
        limits = self.monitor.limits()
        memory_mib = limits["memory_mib"] or p.total_memory >> 20
        return {**known, **limits, "memory_mib": memory_mib, "busy": self.monitor.busy()}

    @torch.inference_mode()
    def check(self, item: Item, config: Any, draw: int) -> Failure | None:
        """Compare the outputs with the reference, on random inputs of seed `draw`."""

        def check() -> Failure | None:
            self._switch_to(item)
            if draw not in self.expected:
                self.expected[draw] = expected_results(item.call, self.device, draw)
            wrong = check_results(config, self.expected[draw])
            return None if wrong is None else Failure("wrong", wrong)

        return self._catch_errors(check)

    @torch.inference_mode()
    def sample(self, item: Item, config: Any, floor_us: float) -> Sample | Failure:
        """One timing sample. floor_us: the roofline of a call whose inputs come from DRAM."""

        def measure() -> Sample | Failure:
            self._switch_to(item)
            entry = self._capture(item, config)
            us, sample = self._time(lambda: _replay(entry), entry.calls * entry.replays)
            cold = len(self.inputs) * item.cost.bytes >= 2 * self.properties.L2_cache_size
            if cold and us < floor_us:
                return Failure("impossible", f"{us:.3g} us is below the floor of {floor_us:.3g} us")
            return sample

        return self._catch_errors(measure)

    @torch.inference_mode()
    def sample_model(self, target: Target, entries: Mapping[str, Mapping[str, Any]], pdl: bool) -> Sample | Failure:
        """One timing sample of a whole model, uint8 image to uint8 image on the device, with its own CUDA graphs."""

        def measure() -> Sample | Failure:
            self._switch_to(None)
            model, image, calls = self._model(target, entries, pdl)
            sample = self._time(lambda: _enlarge(model, image, calls), calls)[1]
            info = model.info()
            if info["non_finite_retries"] or info["graph_fallbacks"]:
                return Failure("error", "random weights overflowed, or no graph could be captured")
            return sample

        return self._catch_errors(measure)

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

    def _switch_to(self, item: Item | None) -> None:
        """Free the tensors of the previous item."""
        key = "" if item is None else item.key
        if key == self.item:
            return
        self.item, self.inputs, self.expected = key, [], {}
        self.captured.clear()
        if item is not None:
            self.models.clear()
        torch.cuda.empty_cache()

    def _capture(self, item: Item, config: Any) -> CapturedConfig:
        if config in self.captured:
            self.captured.move_to_end(config)
            return self.captured[config]
        while len(self.captured) >= GRAPHS:
            self.captured.popitem(last=False)
        if not self.inputs:
            copies = rotation(item.cost.bytes, self.properties.L2_cache_size)
            self.inputs = [random_call(item.call, self.device, seed) for seed in range(copies)]
        # Outputs are allocated before the capture, so that each set of inputs has its own cold output.
        plans = [call.plan(config) for call in self.inputs]
        graph, calls = captured([plan.run for plan in plans])
        entry = CapturedConfig(graph, calls, 1, plans)
        us, _ = self._time(lambda: _replay(entry), entry.calls)
        entry.replays = max(math.ceil(1e3 * READING_MS / max(us * entry.calls, 1e-3)), 1)
        self.captured[config] = entry
        return entry

    def _model(
        self, target: Target, entries: Mapping[str, Mapping[str, Any]], pdl: bool
    ) -> tuple[CompiledSR, torch.Tensor, int]:
        """The target's model with random weights, captured with these overrides; an image; calls per sample."""
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
            self.models[key] = model, image, max(math.ceil(1e3 * MODEL_MS / us), 3)
        return self.models[key]

    def _compile(self, target: Target) -> CompiledSR:
        shapes = model_of(target)
        folded = random_inputs({f"weight {k}": t for k, t in shapes._folded.items()}, self.device, 0)
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

    def _catch_errors(self, action: Callable[[], Any]) -> Any:
        """The action's result, or the failure that its exception means for the candidate."""
        import triton

        try:
            return action()
        except triton.TritonError as error:
            return Failure("error", f"{type(error).__name__}: {error}")
        except RuntimeError as error:
            self.captured.clear()
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as lost:  # sticky: every later call in this context fails too
                raise StickyError(str(error)) from lost
            return Failure("error", f"{type(error).__name__}: {error}")


def _replay(entry: CapturedConfig) -> None:
    for _ in range(entry.replays):
        entry.graph.replay()


def _enlarge(model: CompiledSR, image: torch.Tensor, times: int) -> None:
    for _ in range(times):
        model.enlarge(image)
