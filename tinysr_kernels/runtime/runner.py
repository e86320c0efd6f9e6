"""Runs a model's networks on images: batches, graphs, retries where memory or a dtype's range do not suffice.

An image that runs in one piece is one step, from the image as it came (uint8 or float) to the enlarged and
color-corrected image in the same dtype, with a flag whether the network's output was finite. Of a larger image the
tiles are steps; they come in few shapes, so that images of any size replay the same few graphs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from tinysr_kernels.errors import NonFiniteOutput
from tinysr_kernels.launch.backend import using
from tinysr_kernels.nets import Network
from tinysr_kernels.runtime.device.engine import Outputs, make_room
from tinysr_kernels.runtime.device.graphs import Graphs
from tinysr_kernels.runtime.images.arrays import DEVICE_PIXELS
from tinysr_kernels.runtime.notices import notice
from tinysr_kernels.runtime.tiled_inference import CallPart, Limits, in_one_piece, part_of, restore

WIDER = {torch.float16: (torch.bfloat16, torch.float32), torch.bfloat16: (torch.float32,)}
"""What is tried in turn where a result is not finite: the range first, then the precision as well."""


class Runner:
    """Enlarges batches of RGB images with one model's networks. May be called by several threads."""

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
        """network: the network in a dtype, the same object every time. fix: colors, from restored and original, in the
        result's dtype, and flags that are true where the restored image is finite.
        """
        self.graphs = graphs
        self.limits = limits
        self.retries = 0
        """Images of which something was computed again in a wider dtype."""
        self._network = network
        self._fix = fix
        self._dtype = dtype
        self._backend = backend
        self._upscale = upscale
        self._lock = threading.Lock()

    @torch.inference_mode()
    def __call__(self, rgb: Tensor, out: Tensor | None = None, *, now: bool = False) -> Tensor:
        """[N,3,H,W] uint8, or float32 or float64 in [0,1] -> [N,3,s*H,s*W] in the same dtype and on the same device.

        out: takes the result. now: capture graphs at once instead of when shapes come again. Raises OutOfMemory where
        the smallest tiles do not fit, NonFiniteOutput where no dtype gives finite numbers.
        """
        count, _, height, width = rgb.shape
        parts: list[Tensor] = []
        begin = 0
        with using(self._backend):
            while begin < count:
                whole = in_one_piece(self._network(self._dtype), height, width, self._upscale, self.limits)
                end = min(begin + self.limits.images(height * width), count)
                images = rgb[begin:end]
                try:
                    parts.append(self._enlarge(images, None if out is None else out[begin:end], whole, now))
                except (torch.OutOfMemoryError, MemoryError) as error:
                    self._make_room(images, error)
                else:
                    begin = end
        if out is not None:
            return out
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _make_room(self, images: Tensor, error: BaseException) -> None:
        """Let the next attempt take less memory. Raises OutOfMemory where it cannot."""
        engine = self.graphs.engine
        if make_room(engine):
            return
        with self._lock:
            try:
                what = self.limits.shrink(self._network(self._dtype), tuple(images.shape), engine.device)
            except MemoryError as final:
                raise final from error
        notice(f"out of memory: going on with {what}")

    def _enlarge(self, images: Tensor, out: Tensor | None, whole: bool, now: bool) -> Tensor:
        """A batch that runs together, wherever it lies."""
        engine = self.graphs.engine
        height, width = images.shape[2:]
        if engine.holds(images) or height * width > DEVICE_PIXELS:
            # A large image stays in host memory; its tiles travel (`restore`).
            result, finite = self._attempt(images, out, whole, now)
            (finite,) = engine.download((finite,))
        else:
            at_home = out if images.device.type == "cpu" else None
            with engine.copies():
                result, finite = self._attempt(engine.upload(images), None, whole, now)
                if images.device.type == "cpu":
                    result, finite = engine.download((result, finite), at_home)
                else:
                    (finite,) = engine.download((finite,))
                    result = result.to(images.device) if out is None else out.copy_(result)
        # Flags without values, of images that are shapes alone, have nothing to say.
        for i, flags in enumerate(() if finite.is_meta else finite):
            if not flags.all():
                result[i : i + 1] = self._carefully(images[i : i + 1])
        return result

    def _attempt(self, images: Tensor, out: Tensor | None, whole: bool, now: bool) -> tuple[Tensor, Tensor]:
        """The result, and of each image whether it is finite (`_compute`), both where the images lie; nothing waits for
        the device.
        """

        def part(name: str, x: Tensor, fixed: bool) -> Tensor:
            network = part_of(self._network(self._dtype), name)
            if not fixed:
                return network(x)
            return self.graphs.run((name, self._dtype), lambda t: (network(t),), x, now=now)[0]

        def step(x: Tensor) -> Outputs:
            return self._compute(x, part, self._dtype)

        engine = self.graphs.engine
        if not engine.holds(images):
            result, finite = step(images)
        elif whole:
            # The same image is the same step whichever way it came.
            name = ("image", self._dtype)
            result, finite = self.graphs.run(name, step, images, into=out, now=now, any_layout=True)
        else:
            with engine.lock:
                result, finite = engine.plain(step, (images,))
        return result if out is None or result is out else out.copy_(result), finite

    def _compute(self, images: Tensor, part: CallPart, dtype: torch.dtype) -> Outputs:
        """The images and flags, one or more an image, that are true where it is finite.

        `part` runs parts of the network on what is there in `dtype`.
        """
        single = images.dtype == torch.float64 and dtype != torch.float64
        lr = images.to(torch.float32) if single else images
        sr = restore(self._network(self._dtype), lr, self._upscale, self.limits, part, dtype)
        return self._fix(sr, lr, images.dtype)

    def _carefully(self, image: Tensor) -> Tensor:
        """One image [1,3,H,W] whose result was not finite: what overflows is computed again in wider dtypes."""
        dtypes = (self._dtype, *WIDER.get(self._dtype, ()))
        used: set[torch.dtype] = set()

        def part(name: str, x: Tensor, fixed: bool) -> Tensor:
            # A UNet that saw the whole image in the first attempt would fail again.
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
            result, finite = engine.plain(
                lambda x: self._compute(x, part, torch.float32), (image if large else image.to(engine.device),)
            )
        if not bool(finite.all()):
            raise _not_finite()
        with self._lock:
            self.retries += 1
        wider = " and ".join(str(dtype) for dtype in dtypes[1:] if dtype in used)
        notice(f"{self._dtype} overflowed; what it could not hold was computed in {wider}")
        return result.to(image.device)


def _not_finite() -> NonFiniteOutput:
    return NonFiniteOutput(
        "the network's output is not finite, even in the widest precision; check the checkpoint with `tinysr info`"
    )
