"""Run a model's networks on images: batching, CUDA graphs, and retries after out-of-memory and overflow.

An image that fits in one piece is one step: from the input (uint8 or float) to the upscaled and color-corrected image
in the same dtype, with a flag that tells whether the network's output was finite. For a larger image each tile is a
step. Tiles have few distinct shapes, so that images of any size replay the same few graphs.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.errors import InputError, NonFiniteOutput, OutOfMemory
from tinysr_kernels.launch.backend import using
from tinysr_kernels.nets import Network
from tinysr_kernels.nets.transformer import current_prompt, prompted
from tinysr_kernels.runtime.device.device_error import device_error
from tinysr_kernels.runtime.device.engine import Outputs, free_graphs
from tinysr_kernels.runtime.device.graphs import Graphs
from tinysr_kernels.runtime.device.out_of_memory import empty_host_caches, is_out_of_memory, shortage
from tinysr_kernels.runtime.images.arrays import DEVICE_PIXELS
from tinysr_kernels.runtime.notices import notice
from tinysr_kernels.runtime.prompts import per_prompt
from tinysr_kernels.runtime.tiles.limits import Limits
from tinysr_kernels.runtime.tiles.tiled_inference import (
    CallPart,
    PartOutOfMemory,
    in_one_piece,
    part_of,
    pieces,
    restore,
)

WIDER_DTYPES = {torch.float16: (torch.bfloat16, torch.float32), torch.bfloat16: (torch.float32,)}
"""Dtypes to retry in if a result is not finite: first more range, then also more precision."""


Report = Callable[[int, int], object]
"""progress(done, total): what is done of a call, in tiles and images in one piece."""


def reporting(enlarge: Callable[..., Tensor], progress: Report | None, **options: Any) -> Callable[..., Tensor]:
    """The network `enlarge` with the options of one call, and the same for the code around it (images/arrays.py)."""
    if progress is not None and not callable(progress):
        raise InputError(f"progress must be callable as progress(done, total), found {type(progress).__name__}")
    bound = functools.partial(enlarge, progress=progress, **options)
    bound.takes_bytes = getattr(enlarge, "takes_bytes", False)  # type: ignore[attr-defined]
    return bound


class _Ended(BaseException):
    """Carries what the caller's callback raised past whoever handles the errors of networks, such as MemoryError."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass
class _Call:
    """One call's own state. limits: the model's, or smaller ones after an out-of-memory. done, total: see `Report`.

    base: pieces of the images that are finished.
    """

    limits: Limits
    now: bool
    report: Report | None
    retried: bool = False
    base: int = 0
    done: int = 0
    total: int = 0

    def advance(self, count: int) -> None:
        """Report that many more pieces. What the report raises ends the call."""
        self.done += count
        if self.report is not None:
            try:
                with torch.inference_mode(False):  # a mode of ours, not the caller's
                    self.report(self.done, self.total)
            except Exception as error:
                raise _Ended(error) from error


class Runner:
    """Upscales batches of RGB images with the networks of one model. Thread-safe."""

    def __init__(
        self,
        network: Callable[[torch.dtype], Network],
        fix: Callable[[Tensor, Tensor, torch.dtype], Outputs],
        graphs: Graphs,
        limits: Limits,
        *,
        dtype: torch.dtype,
        backend: str,
        upscale: int,
    ) -> None:
        """network: returns the network in a dtype, always the same object. fix: color fix; takes the upscaled and the
        original image and the result's dtype, and returns the result and a flag per image that is true if the upscaled
        image is finite. upscale: the factor.
        """
        self.graphs = graphs
        self.limits = limits
        self.retries = 0
        """Images that were recomputed, at least in part, in a wider dtype."""
        self._network = network
        self._fix = fix
        self._dtype = dtype
        self._backend = backend
        self._upscale = upscale
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(
        self,
        rgb: Tensor,
        out: Tensor | None = None,
        *,
        now: bool = False,
        progress: Report | None = None,
        prompts: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """[N,3,H,W] uint8, or float32 or float64 in [0,1] -> [N,3,s*H,s*W] in the same dtype and on the same device.

        out: receives the result. now: capture graphs at once instead of when a shape repeats. progress: called with
        (done, total) after every tile or image in one piece, on this thread; what it raises ends the call. The total
        grows where memory runs out. prompts: an embedding [T,X] for each image, where the network takes them. Raises
        OutOfMemory if the smallest tiles do not fit, NonFiniteOutput if the result is not finite in any dtype,
        DeviceError if the GPU fails, and what `Engine.check` raises.
        """
        self.graphs.engine.check()
        count, _, height, width = rgb.shape
        parts: list[Tensor] = []
        begin = 0
        call = _Call(self.limits, now, progress)
        network = self._network(self._dtype)
        with using(self._backend):
            while begin < count:
                per_image = pieces(network, height, width, self._upscale, call.limits)
                call.done, call.total = call.base, call.base + (count - begin) * per_image
                end = per_prompt(prompts, begin, min(begin + call.limits.images(height * width), count))
                prompt = None if prompts is None else self._placed(prompts[begin])
                images = rgb[begin:end]
                failure: tuple[str, bool] | None = None
                try:
                    with prompted(prompt):
                        parts.append(self._enlarge(images, None if out is None else out[begin:end], call))
                except _Ended as ended:
                    raise ended.error from None
                except Exception as error:
                    if not is_out_of_memory(error):
                        lost = device_error(error)
                        if lost is not None:
                            raise lost from error
                        raise
                    # Only what is needed: the traceback of the error holds the tensors of the failed attempt.
                    failure = str(error), isinstance(error, PartOutOfMemory)
                if failure is not None:
                    self._after_shortage(call, images, *failure)
                else:
                    begin, call.base = end, call.done
        if out is not None:
            return out
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _placed(self, prompt: Tensor) -> Tensor:
        """An embedding where the network is, in float32 or wider."""
        return prompt.to(self.graphs.engine.device, torch.promote_types(self._dtype, torch.float32))

    def _after_shortage(self, call: _Call, images: Tensor, error: str, in_part: bool) -> None:
        """After out-of-memory: free what can be freed and try again as before, then with smaller limits for this call.

        error: its text. in_part: whether a part of the network ran out of memory. Raises OutOfMemory where nothing
        smaller is left.
        """
        engine = self.graphs.engine
        empty_host_caches()
        free_graphs(engine)
        if not call.retried:
            call.retried = True
            return
        network = self._network(self._dtype)
        n, _, height, width = images.shape
        if n == 1 and not in_part and not in_one_piece(network, height, width, self._upscale, call.limits):
            large = not engine.holds(images) and height * width > DEVICE_PIXELS
            raise OutOfMemory(
                f"an image of {width}x{height} pixels, enlarged {self._upscale} times in tiles, needs "
                f"{shortage(images.device if large else engine.device, error)}; split it, or close other programs"
            )
        call.limits, allowed = call.limits.smaller(network, tuple(images.shape), engine.device, error)
        notice(f"out of memory: this call continues with {allowed}")

    def _enlarge(self, images: Tensor, out: Tensor | None, call: _Call) -> Tensor:
        """Run one batch on the device, wherever its images are."""
        engine = self.graphs.engine
        height, width = images.shape[2:]
        if engine.holds(images) or height * width > DEVICE_PIXELS:
            # A large image stays in host memory; `restore` copies its tiles.
            result, finite = self._attempt(images, out, call)
            (finite,) = engine.download((finite,))
        else:
            host_out = out if images.device.type == "cpu" else None
            with engine.copies():
                result, finite = self._attempt(engine.upload(images), None, call)
                if images.device.type == "cpu":
                    result, finite = engine.download((result, finite), host_out)
                else:
                    (finite,) = engine.download((finite,))
                    result = result.to(images.device) if out is None else out.copy_(result)
        # Meta tensors have no flags to check.
        for i, flags in enumerate(() if finite.is_meta else finite):
            if not flags.all():
                result[i : i + 1] = self._recompute_wider(images[i : i + 1], call)
        if in_one_piece(self._network(self._dtype), height, width, self._upscale, call.limits):
            call.advance(len(images))
        return result

    def _attempt(self, images: Tensor, out: Tensor | None, call: _Call) -> tuple[Tensor, Tensor]:
        """The result and the finite flags of `_compute`, on the device of the images, without synchronization."""
        height, width = images.shape[2:]
        whole = in_one_piece(self._network(self._dtype), height, width, self._upscale, call.limits)

        def part(name: str, x: Tensor, fixed: bool) -> Tensor:
            network = part_of(self._network(self._dtype), name)
            if not fixed:
                return network(x)
            return self.graphs.run((name, self._dtype), _prompted(network), x, *current_prompt(), now=call.now)[0]

        def reported(name: str, x: Tensor, fixed: bool) -> Tensor:
            result = part(name, x, fixed)
            call.advance(len(x))
            return result

        def step(x: Tensor) -> Outputs:
            return self._compute(x, part if whole else reported, self._dtype, call.limits)

        engine = self.graphs.engine
        if not engine.holds(images):
            result, finite = step(images)
        elif whole:
            # The step is the same for any strides of the image.
            name = ("image", self._dtype, call.limits)
            inputs = (images, *current_prompt())
            result, finite = self.graphs.run(name, _prompted(step), *inputs, out=out, now=call.now, any_layout=True)
        else:
            with engine.lock:
                result, finite = engine.launch(step, (images,), out)
        return result if out is None or result is out else out.copy_(result), finite

    def _compute(self, images: Tensor, part: CallPart, dtype: torch.dtype, limits: Limits) -> Outputs:
        """The result, and one or more flags per image that are true if it is finite.

        part: runs parts of the network in `dtype`.
        """
        to_float32 = images.dtype == torch.float64 and dtype != torch.float64
        lr = images.to(torch.float32) if to_float32 else images
        sr = restore(self._network(self._dtype), lr, self._upscale, limits, part, dtype)
        return self._fix(sr, lr, images.dtype)

    def _recompute_wider(self, image: Tensor, call: _Call) -> Tensor:
        """Recompute an image [1,3,H,W] whose result was not finite, with the parts that overflow in wider dtypes."""
        dtypes = (self._dtype, *WIDER_DTYPES.get(self._dtype, ()))
        used: set[torch.dtype] = set()

        def part(name: str, x: Tensor, fixed: bool) -> Tensor:
            # A UNet that ran on the whole image has already failed in the first dtype.
            for dtype in dtypes[1:] if name == "network" and not fixed else dtypes:
                y = part_of(self._network(dtype), name)(x if x.dtype == torch.uint8 else x.to(dtype))
                if bool(torch.isfinite(y).all()):
                    used.add(dtype)
                    return y.to(torch.promote_types(dtype, torch.float32))
            raise _not_finite()

        engine = self.graphs.engine
        if len(dtypes) == 1:
            raise _not_finite()
        large = image.shape[2] * image.shape[3] > DEVICE_PIXELS
        with engine.lock:
            result, finite = engine.launch(
                lambda x: self._compute(x, part, torch.float32, call.limits),
                (image if large else image.to(engine.device),),
            )
        if not bool(finite.all()):
            raise _not_finite()
        with self._lock:
            self.retries += 1
        wider = " and ".join(str(dtype) for dtype in dtypes[1:] if dtype in used)
        notice(f"{self._dtype} overflowed; the affected parts were recomputed in {wider}")
        return result.to(image.device)


def _prompted(step: Callable[[Tensor], Tensor | Outputs]) -> Callable[..., Outputs]:
    """A step that takes the embedding of its images' prompt, where there is one, as a second input of its graph."""

    def run(x: Tensor, *prompt: Tensor) -> Outputs:
        with prompted(prompt[0] if prompt else None):
            found = step(x)
        return found if isinstance(found, tuple) else (found,)

    return run


def _not_finite() -> NonFiniteOutput:
    return NonFiniteOutput("the network's output is not finite in any dtype; check the checkpoint with `tinysr info`")
