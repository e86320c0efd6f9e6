"""compile(): a checkpoint becomes a CompiledSR."""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from tinysr_kernels.checkpoint.sources import is_called
from tinysr_kernels.errors import CheckpointError, InputError, OutOfMemory, TinySRError, shorten
from tinysr_kernels.families import FAMILIES, ColorFix, check_quantize, fold, load
from tinysr_kernels.first_use import self_check
from tinysr_kernels.launch.backend import choose_backend, obstacle
from tinysr_kernels.nets import is_fp8
from tinysr_kernels.runtime.arguments import check_fp8, check_lora, check_types, choose_dtype, recipe_of
from tinysr_kernels.runtime.compiled import CompiledSR
from tinysr_kernels.runtime.device.choose import choose_device
from tinysr_kernels.runtime.device.device_error import device_error
from tinysr_kernels.runtime.device.modes import without_autocast
from tinysr_kernels.runtime.device.out_of_memory import is_out_of_memory, typed_out_of_memory
from tinysr_kernels.runtime.notices import notice
from tinysr_kernels.runtime.prompts import Embed


@without_autocast()
@typed_out_of_memory("the checkpoint does not fit into host memory", "close other programs")
def compile(
    ckpt: str | PathLike[str] | dict[str, Any] | nn.Module,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "auto",
    quantize: str | None = None,
    cuda_graphs: bool = True,
    color_fix: ColorFix | None = None,
    upscale: int = 4,
    embeddings: str | PathLike[str] | dict[str, Tensor] | Embed | None = None,
    prompt: str | None = None,
    lora_alpha: float | None = None,
    lora_weights: Sequence[float] | None = None,
    max_graph_shapes: int = 8,
    tile: int | None = None,
) -> CompiledSR:
    """Load a checkpoint, fold every constant into its weights and return the model that runs it.

    ckpt: a file or folder, "demo" (the small checkpoint inside the package), a dict naming the parts, or an nn.Module.
    device: default cuda if present, else cpu. dtype: default on cuda the family's own (float16; AdcSR: bfloat16, or
    float16 on a GPU without it), float32 elsewhere.
    backend: "triton" (the kernels), "library" (cuDNN, cuBLAS and PyTorch's attention in the dtype), "reference"
    (float32 or wider) or "auto": on a GPU the first, or the second where kernels cannot run; the last on a CPU.
    quantize: "fp8" for TinySR's transformer in e4m3 (docs/fp8.md): on GPUs of
    compute capability 8.9 or higher, or emulated on the CPU; None leaves it as the checkpoint has it. color_fix:
    "adain", "wavelet", "none"; None takes the family's own. upscale: whole factor (UNet families: what the network
    gives); `model(image, scale=...)` gives other sizes. embeddings: overrides the checkpoint's; what is called with
    each image (`runtime/prompts.py`, Embed) makes the prompt an input, for families with prompts. prompt: for families
    with a text encoder, which embeds it once (docs/checkpoints.md). lora_alpha: of a LoRA that adapts Stable Diffusion,
    in place of what its family or its files say; its scale is alpha / rank. lora_weights: of PiSA-SR's adapters,
    (pixel, semantic), (1, 1) by default. tile: low-resolution side of a UNet's tiles; None runs an image whole up to a
    size that follows from the network and the device's total memory (`info()["whole_image_pixels"]`), and a larger one
    in tiles that follow from them too. cuda_graphs: on a GPU, replay work of a shape that has occurred before from a
    CUDA graph. max_graph_shapes: how many graphs are kept; the least recently used goes first.
    Raises CheckpointError for a checkpoint that cannot be used, InputError for other arguments, and OutOfMemory when
    the weights do not fit on the device.
    """
    check_types(device, dtype, backend, quantize, cuda_graphs, color_fix, upscale, tile, max_graph_shapes, prompt)
    lora = check_lora(lora_alpha, lora_weights)
    run_device = choose_device(device)
    chosen = choose_backend(backend, run_device)
    checkpoint = load(ckpt, embeddings=embeddings, prompt=prompt, **lora)
    for message in checkpoint.notices:
        notice(message)
    if backend == "auto" and chosen == "library":
        notice(f"kernels cannot run: {obstacle(run_device)}; PyTorch's libraries compute instead, slower")
    run_dtype = choose_dtype(dtype, checkpoint.family, run_device)
    folded = checkpoint.tensors
    if quantize is not None:
        check_quantize(checkpoint.family, quantize)
    if quantize is not None or (checkpoint.folded and is_fp8(folded)):
        check_fp8(run_device)
    embed: Any = embeddings if is_called(embeddings) else None
    try:
        if not checkpoint.folded:
            folded = fold(checkpoint.family, checkpoint.config, folded, run_dtype, quantize)
        elif quantize is not None:
            folded = FAMILIES[checkpoint.family].quantize(folded, quantize)
        model = CompiledSR(
            checkpoint,
            folded,
            device=run_device,
            dtype=run_dtype,
            backend=chosen,
            color_fix=color_fix or checkpoint.config.color_fix,
            upscale=upscale,
            tile=tile,
            graphs=max_graph_shapes if cuda_graphs else 0,
            embed=embed,
            recipe=recipe_of(ckpt, embeddings, quantize, prompt, **lora),
        )
    except TinySRError:
        raise
    except Exception as error:
        raise _failure(error, checkpoint.source, run_device) from error
    return _ready(model)


PACKAGES = {"PIL": "pillow", "tinysr_kernels": "tinysr-kernels", "": "tinysr-kernels"}
"""What provides a module of another name."""


def _failure(error: Exception, source: str, device: torch.device) -> TinySRError:
    """What went wrong while weights were folded and placed."""
    if isinstance(error, ImportError):
        return missing_package(error)
    if isinstance(error, KeyError):
        return CheckpointError(f"{source}: expected a tensor named {error}, found none")
    if is_out_of_memory(error):
        reason = str(error).strip().partition("\n")[0][:200]
        return OutOfMemory(f"the weights do not fit on {device}: {reason}; use another device or dtype")
    # only a folded file gets further: what a public checkpoint holds was checked while it was read
    return device_error(error) or CheckpointError(f"{source}: the tensors do not fit together: {shorten(error)}")


def missing_package(error: ImportError) -> InputError:
    """What to install where a module is missing or cannot be imported; no fault of the checkpoint."""
    module = (error.name or "").partition(".")[0]
    package = PACKAGES.get(module, module)
    if isinstance(error, ModuleNotFoundError) and module not in ("", "tinysr_kernels"):
        return InputError(f"the Python module {error.name} is not installed: pip install {package}")
    return InputError(
        f"a Python module cannot be imported: {shorten(error)}; install it again: "
        f"pip install --force-reinstall {package}"
    )


def _ready(model: CompiledSR) -> CompiledSR:
    """The model, its kernels checked at their first use on this GPU; they were compiled when it was made.

    InputError where images are to have prompts of their own and the network has a fixed one.
    """
    if model.embed is not None and model.network.prompt_width is None:
        raise InputError(
            f"{model.source}: its prompt is folded in, so images have none of their own; fold the checkpoint again "
            "with embeddings=a callable"
        )
    if model.backend == "triton":
        self_check.at_compile((call.operator for call in model.launches), model.device)
    return model


def describe(ckpt: str | PathLike[str] | dict[str, Any] | nn.Module) -> dict[str, Any]:
    """What a checkpoint holds, as `CompiledSR.info` of the model it compiles to on the CPU."""
    model = compile(ckpt, device="cpu", backend="reference")
    keys = ("device", "backend", "tile", "whole_image_pixels", "launch_configurations", "non_finite_retries")
    return {k: v for k, v in model.info().items() if k not in keys and not k.startswith(("graph", "kernels"))}


def _reduce(model: CompiledSR) -> tuple[Any, ...]:
    settings, folded = model._settings()
    return (_compile_again, (settings,)) if folded is None else (_from_folded, (settings, folded))


def _compile_again(arguments: dict[str, Any]) -> CompiledSR:
    """Unpickle a model whose checkpoint is in files. Raises what `compile` raises."""
    return compile(**arguments)


def _from_folded(settings: dict[str, Any], folded: dict[str, Tensor]) -> CompiledSR:
    """Unpickle a model whose checkpoint was in memory. Raises InputError where its device or backend is not there."""
    device = choose_device(settings["device"])
    choose_backend(settings["backend"], device)
    return _ready(CompiledSR(folded=folded, **settings | {"device": device}))


copyreg.pickle(CompiledSR, _reduce)
