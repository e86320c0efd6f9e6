"""CompiledSR: a network on a device that takes images of any kind and size and enlarges them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from tinysr_kernels.checkpoint import folded_metadata, write_folded
from tinysr_kernels.families import (
    FAMILIES,
    Checkpoint,
    ColorFix,
    check_built,
    config_to_dict,
)
from tinysr_kernels.first_use.compile_ahead import Prepared, compile_ahead
from tinysr_kernels.launch import configs
from tinysr_kernels.launch.backend import using
from tinysr_kernels.launch.device import assume, gpu_at
from tinysr_kernels.nets import Network, is_fp8, place
from tinysr_kernels.nets.transformer import prompted
from tinysr_kernels.ops.trace import Call, trace
from tinysr_kernels.runtime.arguments import dtype_name, noise
from tinysr_kernels.runtime.color_fix import fix_colors
from tinysr_kernels.runtime.device.cuda import engine_for
from tinysr_kernels.runtime.device.engine import Outputs
from tinysr_kernels.runtime.device.graphs import Graphs
from tinysr_kernels.runtime.dispatch import Kind, upscale_image
from tinysr_kernels.runtime.images.scaling import Target
from tinysr_kernels.runtime.prompts import Embed, Prompts, prompts_of
from tinysr_kernels.runtime.runner import Report, Runner, reporting
from tinysr_kernels.runtime.streaming import OnError, Stopped, in_order
from tinysr_kernels.runtime.tiles.limits import UNLIMITED, Limits
from tinysr_kernels.runtime.tiles.tiled_inference import restore, use_upscale

TRACE_SIDE = 128
TRACE_TOKENS = 77
"""Of a prompt, where each image has its own: what CLIP pads to."""
UNTILED = Limits()


class CompiledSR:
    """A super-resolution model ready to run: folded weights on one device, called with images. Made by `compile`.

    May be called from several threads at once; every call is independent of the others. A pickled copy, as for spawned
    workers, compiles the same checkpoint with the same arguments again; one whose checkpoint was in memory carries its
    folded weights. `copy` and `deepcopy` give the model itself, which nothing changes.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folded: Mapping[str, Tensor],
        *,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
        color_fix: ColorFix,
        upscale: int,
        tile: int | None,
        graphs: int = 0,
        recipe: dict[str, Any] | None = None,
        embed: Embed | None = None,
    ) -> None:
        """graphs: how many CUDA graphs are kept at most. embed: gives the embedding of each image's prompt.

        recipe: the arguments of `compile` that give this model again. None: they hold tensors or modules.
        """
        self._checkpoint = replace(checkpoint, tensors={})
        self._recipe = recipe
        self.embed = embed
        self.family = checkpoint.family
        self.config = checkpoint.config
        self._family = FAMILIES[checkpoint.family]
        self.source = checkpoint.source
        self.device = device
        self.dtype = dtype
        self.backend = backend
        self.quantize = "fp8" if is_fp8(folded) else None
        self.color_fix = color_fix
        self.upscale = upscale
        self.notices = list(checkpoint.notices)
        self._merged = list(checkpoint.merged)
        self._folded = place(folded, device, dtype)
        self._networks = {dtype: self._build(self._folded)}
        check_built(self.network, self._folded, checkpoint.source, dtype)
        self._lock = threading.Lock()
        self._prepared = Prepared()
        self.launches = self._trace((1, 3, TRACE_SIDE, TRACE_SIDE), torch.uint8, UNTILED)
        """Every operator call for one 128x128 image in order, the color fix included; counted on meta tensors."""
        limits = Limits.of(self.network, self.launches, TRACE_SIDE**2, device, backend, tile)
        self._runner = Runner(
            self._network,
            self._fix,
            Graphs(engine_for(device), graphs),
            limits,
            dtype=dtype,
            backend=backend,
            upscale=upscale,
        )
        self._compile_ahead(self._usual())

    @property
    def network(self) -> Network:
        """The compiled network in its own dtype."""
        return self._networks[self.dtype]

    def __call__(
        self,
        image: Kind,
        *,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        longest: int | None = None,
        progress: Report | None = None,
        max_pixels: int | None = None,
        frame: int | None = None,
        out: Tensor | None = None,
        embeddings: Any = None,
    ) -> Kind:
        """Enlarge one image, or a batch of equal size, and return the same kind of object.

        image: PIL.Image; numpy [H,W,C] or [N,H,W,C]; torch [3,H,W] or [N,3,H,W]; `runtime/images/pil.py` and
        `runtime/images/arrays.py` list modes, dtypes and ranges.
        scale, size, longest: at most one of a factor in (0, 8], (width, height), or the longer side in pixels. The
        network enlarges by its own factor, and its image is resized, antialiased, before it is rounded; without any,
        the result is the network's. progress: called with (done, total) after every tile, or image in one piece, on the
        calling thread; what it raises ends the call and comes out of it. max_pixels: refuse larger inputs. frame: which
        frame of a multi-frame PIL image. out: for tensors, where the result goes, of the image's dtype and device; in
        pinned host memory it is written by the device itself. embeddings: of a model compiled with a callable
        `embeddings`, in its place: a callable, a tensor [T,X], or one for each image (runtime/prompts.py). Raises
        InputError, OutOfMemory, NonFiniteOutput, DeviceError.
        """
        self._runner.graphs.engine.check()  # before images are copied to the device
        prompts = prompts_of(embeddings, self.embed, self.network)
        result = upscale_image(
            image,
            reporting(self.enlarge, progress, prompts=prompts),
            self.upscale,
            device=self.device,
            max_pixels=max_pixels,
            frame=frame,
            out=out,
            target=Target(scale, size, longest),
        )
        if prompts is not None:
            prompts.finish()
        return result

    def enlarge(
        self, rgb: Tensor, out: Tensor | None = None, *, progress: Report | None = None, prompts: Prompts | None = None
    ) -> Tensor:
        """[N,3,H,W] RGB -> [N,3,s*H,s*W], same dtype and device: uint8, or float32 or float64 in [0,1].

        The network computes on its own device in its own dtype; the color fix in float32 or wider. out: takes the
        result, if given. progress: see `__call__`. prompts: of a model whose images have one each, by default what it
        was compiled with gives.
        """
        if prompts is None:
            prompts = prompts_of(None, self.embed, self.network)
        embeddings = None if prompts is None else prompts.take(rgb)
        return self._runner(rgb, out, progress=progress, prompts=embeddings)

    enlarge.takes_bytes = True  # type: ignore[attr-defined]  # see images.py

    def _fix(self, sr: Tensor, lr: Tensor, dtype: torch.dtype) -> Outputs:
        return fix_colors(sr, lr, self.color_fix, self._family.adain, self.upscale, dtype)

    def _network(self, dtype: torch.dtype) -> Network:
        """The network in `dtype`, built from the folded weights on first need."""
        with self._lock:
            if dtype not in self._networks:
                placed = place(self._folded, self.device, dtype)
                self._networks[dtype] = self._build(placed)
            return self._networks[dtype]

    def _build(self, folded: dict[str, Tensor]) -> Network:
        """The network over folded tensors, for the model's factor. InputError where it has another."""
        network = self._family.build(self.config, folded)
        use_upscale(network, self.upscale)
        return network

    def warmup(self, shapes: Iterable[Sequence[int]], dtype: torch.dtype = torch.uint8) -> None:
        """Run once for each shape (H, W) or (N, H, W), in low-resolution pixels, so that later calls start warm.

        Compiles kernels, several at once (first_use/compile_ahead.py), and, on a GPU, captures CUDA graphs at once, of
        which the last max_graph_shapes stay. dtype: of the images to come; uint8 is also that of PIL images.
        """
        images = [noise(shape, dtype) for shape in shapes]
        self._compile_ahead(call for batch in images for call in self._planned(batch))
        for batch in images:
            self._runner(batch, now=True, prompts=self._no_prompts(batch))

    def _no_prompts(self, images: Tensor) -> list[Tensor] | None:
        """Embeddings of the usual number of tokens for a warm-up."""
        width = self.network.prompt_width
        return (
            None
            if width is None
            else [torch.zeros((TRACE_TOKENS, width), dtype=torch.float32, device="cpu")] * len(images)
        )

    def _compile_ahead(self, calls: Iterable[Call]) -> None:
        """Compile the kernels of these operator calls, unless they are on disk: see first_use/compile_ahead.py."""
        if self.backend == "triton":
            operators = (call.operator for call in calls if call.operator is not None)
            self._prepared = compile_ahead(operators, self.device)

    def _usual(self) -> Iterator[Call]:
        """The operator calls for an image of 128x128, and for one in four tiles where a tile was asked for."""
        yield from self.launches
        tile = self._runner.limits.tile
        if tile is not None:
            yield from self._planned(torch.empty((1, 3, 2 * tile, 2 * tile), dtype=torch.uint8, device="meta"))

    def _planned(self, images: Tensor) -> Iterator[Call]:
        """The operator calls for these images, which the runner takes in batches of at most so many."""
        count, _, height, width = images.shape
        most = min(self._runner.limits.images(height * width), count)
        for size in {most, count % most} - {0}:
            yield from self._trace((size, 3, height, width), images.dtype, self._runner.limits)

    def stream(
        self,
        frames: Iterable[Kind],
        *,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        longest: int | None = None,
        on_error: OnError = "raise",
        buffers: int | None = None,
    ) -> Iterator[Any]:
        """Enlarge frames in order, computing the next ones while the caller handles the previous result.

        On a GPU the copy of one frame to the device, the computing of another and the copy of a third back go on at
        the same time; on the CPU the next frame is computed while the caller reads and writes others. frames: taken by
        the calling thread, up to `buffers` ahead (3 on a GPU, else 2; with 1 nothing overlaps and nothing is delayed).
        scale, size, longest: of each frame, see `__call__`.
        on_error: "raise" ends the stream with the error of a frame at its turn, after all earlier results; "yield"
        gives the error in place of the result and goes on. Closing the generator ends what is under way after its tile.
        """
        Target(scale, size, longest)  # refused at once, not at the first frame
        engine = self._runner.graphs.engine
        if buffers is None:
            buffers = 3 if engine.overlaps else 2
        stopped = threading.Event()

        def unless_stopped(_done: int, _total: int) -> None:
            if stopped.is_set():
                raise Stopped("the stream was closed")

        call = partial(self.__call__, scale=scale, size=size, longest=longest, progress=unless_stopped)
        workers = buffers if engine.overlaps else 1
        return in_order(engine.bound(call), frames, workers=workers, ahead=buffers, on_error=on_error, stop=stopped.set)

    def _trace(self, shape: tuple[int, ...], dtype: torch.dtype, limits: Limits) -> list[Call]:
        """Enlarge images without memory or time, which also proves that the tensors' shapes fit together."""
        meta = self._build({k: v.to("meta") for k, v in self._folded.items()})
        single = dtype == torch.float64 and self.dtype != torch.float64  # as the runner has it
        lr = torch.empty(shape, dtype=torch.float32 if single else dtype, device="meta")

        width = meta.prompt_width
        prompt = None if width is None else torch.empty((TRACE_TOKENS, width), dtype=torch.float32, device="meta")

        def enlarge() -> Outputs:
            return self._fix(restore(meta, lr, self.upscale, limits, dtype=self.dtype), lr, dtype)

        with assume(gpu_at(self.device)), using(self.backend), prompted(prompt):
            return trace(enlarge, kernels=self.backend == "triton", library=self.backend == "library")

    def info(self) -> dict[str, Any]:
        """What this model is and how it runs, as a JSON-serializable dictionary.

        parameters: numbers in the folded weights; launches, flops and macs: for one 128x128 image; kernels_planned:
        distinct kernels of the images that `compile` or `warmup` planned last, kernels_compiled: those of them that lay
        in Triton's cache on disk then, both 0 where kernels are not compiled ahead; graphs_held: CUDA graphs now,
        graph_captures, graph_replays and graph_fallbacks (captures that failed) so far; folded: what was merged and
        folded into the weights. tile: of a UNet, as asked for; whole_image_pixels: up to how many pixels an image runs
        whole where no tile was asked for, None for a network whose tiles change nothing.
        """
        flops = sum(call.cost.flops for call in self.launches)
        graphs, limits = self._runner.graphs.statistics, self._runner.limits
        return {
            "family": self.family,
            "source": self.source,
            "parameters": sum(t.numel() for t in self._folded.values()),
            "device": str(self.device),
            "dtype": dtype_name(self.dtype),
            "quantize": self.quantize,
            "backend": self.backend,
            "upscale": self.upscale,
            "tile": limits.tile,
            "whole_image_pixels": limits.pixels if limits.pixels < UNLIMITED else None,
            "color_fix": self.color_fix,
            "config": config_to_dict(self.config),
            "launches_per_image": sum(len(call.steps) for call in self.launches),
            "flops_128x128": flops,
            "macs_128x128": flops // 2,
            "kernels_planned": self._prepared.planned,
            "kernels_compiled": self._prepared.compiled,
            "graphs_held": len(self._runner.graphs),
            "graph_captures": graphs.captures,
            "graph_replays": graphs.replays,
            "graph_fallbacks": graphs.fallbacks,
            "launch_configurations": dict(Counter(call.source for call in self.launches for _ in call.steps)),
            "programmatic_dependent_launch": self._launches_early(),
            "non_finite_retries": self._runner.retries,
            "folded": self._merged + self._family.folds(self._folded),
            "notices": self.notices,
        }

    def _launches_early(self) -> bool:
        return self.backend == "triton" and self.device.type == "cuda" and configs.pdl(gpu_at(self.device))

    def save(self, path: str | PathLike[str], *, replace: bool = True) -> None:
        """Write the folded weights as one safetensors file that `compile(path)` loads without folding again.

        Quantized weights are written as they are, and come back so. The file appears whole or not at all. An existing
        one is only replaced if it is a folded file, another than the model's own, and `replace` is true. Raises
        InputError where the path cannot be written, CheckpointError when writing fails.
        """
        metadata = folded_metadata(self.family, self.config, dtype_name(self.dtype), self._folded, self.quantize)
        write_folded(path, self._folded, metadata, replace=replace, source=self._checkpoint.file)

    def __copy__(self) -> CompiledSR:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledSR:
        return self

    def _settings(self) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
        """The arguments of `compile` that give this model again.

        For a checkpoint that was in memory: the other arguments of `CompiledSR`, and the folded weights on the CPU.
        """
        limits, graphs = self._runner.limits, self._runner.graphs.limit
        settings: dict[str, Any] = {
            "device": str(self.device),
            "dtype": self.dtype,
            "backend": self.backend,
            "color_fix": self.color_fix,
            "upscale": self.upscale,
            "tile": limits.tile,
        }
        if self._recipe is not None:
            return self._recipe | settings | {"cuda_graphs": graphs > 0, "max_graph_shapes": max(graphs, 1)}, None
        tensors = {name: tensor.cpu() for name, tensor in self._folded.items()}
        return settings | {"checkpoint": self._checkpoint, "graphs": graphs, "embed": self.embed}, tensors
